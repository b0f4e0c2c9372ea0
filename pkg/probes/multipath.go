package probes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Multipath checks dm-multipath: the kernel's maps and paths, the daemon that
// looks after them, maps that should not be and paths that should be in one.
//
// The kernel is asked about maps (device-mapper ioctl, sysfs), because its table
// is what I/O goes through; multipathd adds its checkers' opinion, and stands in
// where the ioctl is not permitted. multipathd is never woken: nothing connects
// to its socket unless its process was seen first.
type Multipath struct {
	Common
	// MinPaths is how many paths of each map must work; 0 asks for as many as
	// the map had at best, and for every path that is in the map now.
	MinPaths int `json:"minPaths"`
	// LocalTargets are beginnings of iSCSI or NVMe target names whose disks
	// are replicated by other means and must not be multipathed, beside those
	// of Longhorn and OpenEBS, which are known.
	LocalTargets []string `json:"localTargets,omitempty"`
	// Settings are what multipathd's configuration in force must say, keys of
	// the defaults section of multipath.conf(5); empty asks nothing.
	Settings map[string]string `json:"settings,omitempty"`
}

// DefaultMultipath returns the default settings.
func DefaultMultipath() Multipath { return Multipath{} }

// Name implements [Probe].
func (Multipath) Name() string { return "multipath" }

// Condition implements [Probe].
func (Multipath) Condition() string { return ConditionPrefix + "MultipathProblem" }

// Wakes implements [Probe]. A path that fails is a uevent of its map's.
func (Multipath) Wakes(Require) Wakes {
	return Wakes{
		Subsystems: []string{"block"},
		Units:      []string{"multipathd.service"},
		Files:      followed("/etc/multipath.conf", "/etc/multipath/conf.d/"),
		Processes:  []string{"multipathd"},
		// multipathd's own view of a path comes after the kernel's, and what it
		// was configured with after the file.
		Again: 3 * time.Second,
	}
}

// Rules implements [Probe].
func (Multipath) Rules() []finding.Rule {
	return []finding.Rule{{
		Reason:    "AllPathsFailed",
		Severity:  finding.Critical,
		Means:     "No path of a multipath map works: I/O on it fails, or hangs where the map queues.",
		Do:        "Look at the fabric, the target and the zoning or iSCSI sessions of the paths in the evidence; multipathd reinstates a path by itself once it works.",
		HoldClear: 30 * time.Second,
		HoldWhy:   "told at once, because I/O fails at once; cleared after more than one round of multipathd's checkers (5 to 20 s), as a path that has just returned often fails again",
	}, {
		Reason:    "PathsDegraded",
		Severity:  finding.Warning,
		Means:     "A multipath map works with fewer paths than it should have: the next failure may be the last.",
		Do:        "Repair the failed path (cable, switch, iSCSI session, target port). If the array was meant to lose a path, set minPaths.",
		HoldClear: time.Minute,
		HoldWhy:   "told at once, because the kernel has taken the path out of use after a failed I/O; one that flaps must hold through three rounds of the checkers (20 s each) to count as repaired, and is one problem until then",
	}, {
		Reason:    "QueueingWithoutPaths",
		Severity:  finding.Critical,
		Means:     "A multipath map without a working path queues I/O: whatever reads or writes it hangs in D state and can not be killed.",
		Do:        "Bring a path back, or let the I/O fail with `multipathd disablequeueing map MAP` so that pods can be moved; then set no_path_retry to a number in multipath.conf.",
		HoldClear: 30 * time.Second,
		HoldWhy:   "as AllPathsFailed",
	}, {
		Reason:     "MultipathdDown",
		Severity:   finding.Critical,
		Means:      "Multipath maps exist and multipathd does not run: failed paths are never reinstated, new ones never added, and queueing can not be switched off.",
		Do:         "systemctl start multipathd.service, and read its journal for why it ended.",
		HoldBefore: 15 * time.Second,
		HoldWhy:    "Restart=on-failure brings it back within a second or two, without a job that would be seen; told at once when systemd has given it up",
	}, {
		Reason:     "MultipathdUnresponsive",
		Severity:   finding.Warning,
		Means:      "multipathd runs and does not answer, or has not left its start or reconfiguration: paths may not be watched.",
		Do:         "Look whether the process is stopped or waits for a disk (state T or D in ps); `multipathd show daemon` by hand; restart it as the last resort, never while paths are down and maps queue.",
		HoldBefore: time.Minute,
		HoldWhy:    "a reconfiguration with hundreds of LUNs holds its tables for tens of seconds",
	}, {
		Reason:     "MapSuspended",
		Severity:   finding.Critical,
		Means:      "A multipath map stays suspended: all I/O on it waits.",
		Do:         "Find who suspended it (an interrupted dmsetup, multipath or resize); `dmsetup resume MAP` lets the I/O go on.",
		HoldBefore: 30 * time.Second,
		HoldWhy:    "every table reload suspends a map for some milliseconds, a resize for seconds; within one pass it is looked at twice",
	}, {
		Reason:   "UnwantedMap",
		Severity: finding.Warning,
		Means:    "A multipath map lies over a disk that is replicated by other means or local, such as a Longhorn volume: mounting the disk itself fails with 'already mounted or mount point busy'.",
		Do:       "Blacklist such disks in multipath.conf, by device vendor and product or by protocol and not every sd*; `multipathd reconfigure`, and `multipath -f MAP` once nothing uses the map.",
	}, {
		Reason:     "PathsNotMultipathed",
		Severity:   finding.Warning,
		Means:      "Several paths lead to the same disk and at least one is in no multipath map: using them side by side corrupts data, using one alone has no failover.",
		Do:         "Let multipathd claim the disk (find_multipaths, wwids file, blacklist in multipath.conf), or log out of the path that is not needed.",
		HoldBefore: time.Minute,
		HoldWhy:    "an attach logs in to portal after portal, and multipathd takes seconds to make the map of them",
	}, {
		Reason:   "MultipathSettingMismatch",
		Severity: finding.Warning,
		Means:    "multipathd's configuration in force differs from what this host's storage needs.",
		Do:       "Put the setting into a file of your own in /etc/multipath/conf.d and run `multipathd reconfigure`.",
	}}
}

// Validate implements [Probe].
func (p Multipath) Validate() error {
	var errs []error
	if p.MinPaths < 0 {
		errs = append(errs, fieldErr("minPaths", "want 0 (as many as a map had at best) or more, not %d", p.MinPaths))
	}
	for i, t := range p.LocalTargets {
		if !strings.HasPrefix(t, "iqn.") && !strings.HasPrefix(t, "nqn.") && !strings.HasPrefix(t, "eui.") && !strings.HasPrefix(t, "naa.") {
			errs = append(errs, fieldErr(fmt.Sprintf("localTargets[%d]", i), "%q is no beginning of a target name: want one such as \"iqn.2019-10.io.longhorn:\"", t))
		}
	}
	for key := range p.Settings {
		if key == "" || strings.ContainsAny(key, " \t\"{}") {
			errs = append(errs, fieldErr("settings", "%q is no key of multipath.conf's defaults section", key))
		}
	}
	return errors.Join(errs...)
}

// Check implements [Probe].
func (p Multipath) Check(ctx context.Context, in Input) (finding.Result, error) {
	var r finding.Result
	disks, err := blockNames(ctx, in.Host)
	if err != nil {
		return r, fmt.Errorf("block devices: %w", err)
	}
	found, kernelErr := multipathMaps(ctx, in.Host, in.Memory, disks)
	required := in.Require.HasPackage("multipath") || in.Require.HasModule("dm_multipath") || in.Require.HasUnit("multipathd.service")

	wanted := p.wantedSettings(in.Require)
	daemon, daemonErr := p.daemon(ctx, in, len(found) > 0, required, wanted)
	said := make(map[string]*multipathdMap, len(daemon.maps))
	for i := range daemon.maps {
		said[daemon.maps[i].WWID] = &daemon.maps[i]
	}
	for i := range found {
		found[i].hear(said[found[i].wwid])
	}
	errs := []error{daemonErr}
	// Whoever may not use the ioctl is still told everything by the daemon, of the
	// maps that it knows.
	if kernelErr != nil && (len(found) == 0 || slices.ContainsFunc(found, func(m multipathMap) bool { return said[m.wwid] == nil || !m.told() })) {
		errs = append(errs, kernelErr)
	}

	mounts := mountsOver{host: in.Host}
	targets := iscsiTargets{host: in.Host, names: map[string]string{}}
	judged := settledIn(in.Memory, "wanted maps", in.Now)
	local := judged.sum(0, p.LocalTargets...)
	working, total := 0, 0
	for i := range found {
		m := &found[i]
		if err := m.err; err != nil {
			errs = append(errs, err)
			continue
		}
		usable := m.usable()
		best := 0
		if m.told() {
			working, total = working+usable, total+len(m.paths)
			best = int(in.Memory.Best(bestPathsOf+m.wwid, int64(usable)))
			label := m.label()
			r.Sample("hosthygiene_multipath_paths", float64(usable), "map", label, "state", "active")
			r.Sample("hosthygiene_multipath_paths", float64(len(m.paths)-usable), "map", label, "state", "failed")
		}
		for _, path := range m.paths {
			// Whoever takes a path offline by hand is not announced otherwise.
			if path.stateDir != "" && len(r.Follow) < maxFollow {
				r.Follow = append(r.Follow, path.stateDir+"/state")
			}
		}
		p.judgePaths(ctx, &r, m, best, &mounts)
		p.judgeSuspended(ctx, in.Host, &r, m, &mounts)
		sum := m.places(judged, local)
		if judged.is(m.wwid, sum) {
			continue
		}
		unwanted, err := p.judgeWanted(ctx, &r, m, targets, &mounts)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !unwanted:
			judged.remember(m.wwid, sum, in.Now)
		}
	}
	if kernelErr == nil {
		known := make(map[string]bool, len(found))
		for _, m := range found {
			known[bestPathsOf+m.wwid] = true
		}
		in.Memory.Retain(bestPathsOf, func(key string) bool { return known[key] })
	}
	if !slices.ContainsFunc(found, func(m multipathMap) bool { return m.err != nil }) {
		errs = append(errs, pathsOutsideMaps(ctx, in.Host, &r, disks, found))
	}

	judgeDaemon(in, &r, daemon, len(found))
	judgeMultipathSettings(&r, daemon, wanted)

	says := "multipathd is not running"
	switch {
	case !daemon.seen:
		says = "multipathd could not be looked for"
	case daemon.queued:
		says = "multipathd is being started or stopped"
	case daemon.state != "":
		says = "multipathd answers (" + daemon.state + ")"
	case daemon.running:
		says = "multipathd is running"
	}
	if len(found) > 0 {
		r.Summary = fmt.Sprintf("%d of %d multipath paths work, maps: %d; %s", working, total, len(found), says)
	} else {
		r.Summary = "no multipath map; " + says
	}
	r.NotApplicable = len(found) == 0 && !daemon.running && !daemon.queued && !required
	return r, errors.Join(errs...)
}

// bestPathsOf begins the memory of how many paths a map had at best.
const bestPathsOf = "paths/"

// multipathMap is one dm-multipath map.
type multipathMap struct {
	// name is the alias, wwid the dm uuid without "mpath-".
	name, wwid string
	dev        host.DevNum
	suspended  bool
	// queues is queue_if_no_path in the live table. The configuration does not
	// tell: removing no_path_retry and reconfiguring leaves it in the table,
	// and a clean stop of multipathd takes it out.
	queues bool
	// table and status are the device-mapper's lines; empty without the ioctl.
	table, status string
	// queueing and checkers are multipathd's words.
	queueing string
	paths    []multipathPath
	// err is set when the map's own lines were not understood.
	err error
}

// multipathPath is one path of a map, as each witness sees it; what was not
// asked or did not answer is empty.
type multipathPath struct {
	dev  host.DevNum
	name string
	// link is the device's place in /sys/devices.
	link string
	// kernel is "active" or "failed", state the SCSI device's state, checker
	// multipathd's.
	kernel, state, checker string
	// stateDir is where state was read.
	stateDir string
	// gone: the block device is no longer in sysfs.
	gone bool
}

// failed reports whether the path carries no I/O. The device's own state counts
// beside the map's, which learns of it from the next failing I/O or check only.
// A blocked device is not failed: its transport is recovering, and says so.
func (p multipathPath) failed() bool {
	switch p.checker {
	case "faulty", "disconnected", "i/o timeout":
		return true
	}
	return p.gone || p.kernel == "failed" || p.deviceDown()
}

// deviceDown reports whether the device refuses I/O by its own state, of SCSI
// (drivers/scsi/scsi_sysfs.c) or NVMe.
func (p multipathPath) deviceDown() bool {
	return slices.Contains([]string{"offline", "transport-offline", "cancel", "deleted", "dead"}, p.state)
}

// told reports whether the kernel or multipathd said of each path whether the
// map uses it. Sysfs alone shows the devices' own states.
func (m *multipathMap) told() bool {
	return !slices.ContainsFunc(m.paths, func(p multipathPath) bool { return p.kernel == "" && !p.failed() })
}

func (m *multipathMap) usable() int {
	n := 0
	for _, p := range m.paths {
		if !p.failed() {
			n++
		}
	}
	return n
}

// disk is the kernel's name of a device-mapper device.
func (m *multipathMap) disk() string { return "dm-" + strconv.FormatUint(uint64(m.dev.Minor), 10) }

func devT(d host.DevNum) string {
	return strconv.FormatUint(uint64(d.Major), 10) + ":" + strconv.FormatUint(uint64(d.Minor), 10)
}

func parseDevT(s string) (host.DevNum, bool) {
	major, minor, ok := strings.Cut(s, ":")
	a, errA := strconv.ParseUint(major, 10, 32)
	b, errB := strconv.ParseUint(minor, 10, 32)
	return host.DevNum{Major: uint32(a), Minor: uint32(b)}, ok && errA == nil && errB == nil
}

// multipathMaps lists the maps with their paths, from the ioctl or, where that
// is not permitted or there is no running kernel, from sysfs. The error says
// what sysfs could not tell instead.
// Memory may be nil.
func multipathMaps(ctx context.Context, v host.View, memory *Memory, disks []string) ([]multipathMap, error) {
	// Without any dm device nothing must be asked: opening the control node
	// would load the module.
	if !slices.ContainsFunc(disks, func(d string) bool { return strings.HasPrefix(d, "dm-") }) {
		return nil, nil
	}
	devs, err := v.DeviceMapper(ctx)
	if err != nil {
		found, sysfsErr := sysfsMultipathMaps(ctx, v, disks)
		look(ctx, v, memory, found)
		if sysfsErr == nil && len(found) == 0 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, host.ErrNotLive)) {
			return nil, nil // sysfs shows every map there is
		}
		return found, errors.Join(fmt.Errorf("which paths the kernel uses, device-mapper ioctl: %w", err), sysfsErr)
	}
	var found []multipathMap
	for _, d := range devs {
		// Partitions of a map are "part1-mpath-..." and judged with it.
		wwid, ok := strings.CutPrefix(d.UUID, multipathUUID)
		if !ok {
			continue
		}
		m := multipathMap{name: shown(d.Name), wwid: wwid, dev: d.Dev, suspended: d.Suspended}
		i := slices.IndexFunc(d.Targets, func(t host.DMTarget) bool { return t.Type == "multipath" })
		if i < 0 {
			m.err = fmt.Errorf("map %s has no multipath target in its table", m.name)
		} else {
			t := d.Targets[i]
			m.table, m.status, m.queues = t.Table, t.Status, queuesWithoutPath(t.Table)
			if m.paths, m.err = parseMultipathStatus(t.Status); m.err != nil {
				m.err = fmt.Errorf("device-mapper status of map %s: %w", m.name, m.err)
			}
		}
		found = append(found, m)
	}
	look(ctx, v, memory, found)
	return found, nil
}

// multipathUUID begins the dm uuid of every map that multipath-tools made.
const multipathUUID = "mpath-"

// sysfsMultipathMaps lists the maps as sysfs shows them to anybody: names, and
// the paths by name, but not which of them the map has given up.
func sysfsMultipathMaps(ctx context.Context, v host.View, disks []string) ([]multipathMap, error) {
	var found []multipathMap
	for _, disk := range disks {
		if !strings.HasPrefix(disk, "dm-") {
			continue
		}
		dir := "/sys/block/" + disk
		uuid, err := deviceAttr(ctx, v, dir+"/dm/uuid")
		if err != nil {
			return found, err
		}
		wwid, ok := strings.CutPrefix(uuid, multipathUUID)
		if !ok {
			continue
		}
		m := multipathMap{wwid: wwid}
		if m.name, err = deviceAttr(ctx, v, dir+"/dm/name"); err != nil {
			return found, err
		}
		number, err := deviceAttr(ctx, v, dir+"/dev")
		if err != nil {
			return found, err
		}
		m.name = shown(m.name)
		m.dev, _ = parseDevT(number)
		suspended, err := deviceAttr(ctx, v, dir+"/dm/suspended")
		if err != nil {
			return found, err
		}
		m.suspended = suspended == "1"
		slaves, err := v.ReadDir(ctx, dir+"/slaves")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return found, err
		}
		for _, name := range slaves {
			number, err := deviceAttr(ctx, v, "/sys/block/"+name+"/dev")
			if err != nil {
				return found, err
			}
			p := multipathPath{name: name}
			p.dev, _ = parseDevT(number)
			m.paths = append(m.paths, p)
		}
		found = append(found, m)
	}
	return found, nil
}

// blockNames are the names in /sys/block.
func blockNames(ctx context.Context, v host.View) ([]string, error) {
	devices, err := v.BlockDevices(ctx)
	names := make([]string, len(devices))
	for i, d := range devices {
		names[i] = d.Name
	}
	return names, err
}

// pathPlace is where a number led in /sys/dev/block, and to which device: a
// number leads there as long as the device lives.
type pathPlace struct {
	link string
	node uint64
}

// look finds the paths' devices in sysfs and takes their state.
func look(ctx context.Context, v host.View, memory *Memory, found []multipathMap) {
	// Who can not see the devices can not see their states either: then the
	// map's own word is all there is, as for disks of other kinds.
	devices, _ := v.BlockDevices(ctx)
	var kept map[host.DevNum]pathPlace
	if memory != nil {
		kept, _ = Kept[map[host.DevNum]pathPlace](memory, "paths of maps")
	}
	next := make(map[host.DevNum]pathPlace, len(kept))
	var unknown []*multipathPath
	for i := range found {
		for j := range found[i].paths {
			p := &found[i].paths[j]
			if k, ok := kept[p.dev]; ok && p.at(devices, k) {
				next[p.dev] = k
				continue
			}
			unknown = append(unknown, p)
		}
	}
	const dir = "/sys/dev/block"
	if len(unknown) > 0 {
		numbers := make([]string, len(unknown))
		for i, p := range unknown {
			numbers[i] = devT(p.dev)
		}
		for i, link := range v.ReadLinks(ctx, dir, numbers) {
			p := unknown[i]
			if errors.Is(link.Err, fs.ErrNotExist) {
				p.gone = true
				p.name = numbers[i]
				continue
			}
			if p.link = link.Target; p.link == "" {
				continue
			}
			p.name = path.Base(p.link)
			if d, ok := blockDevice(devices, p.name); ok {
				p.takeState(d)
				if d.Node != 0 {
					next[p.dev] = pathPlace{p.link, d.Node}
				}
			}
		}
	}
	if memory != nil {
		memory.Keep("paths of maps", next)
	}
	// Disks that are not SCSI have no state, and NVMe another one.
	for i := range found {
		for j := range found[i].paths {
			if p := &found[i].paths[j]; p.state == "" && !p.gone {
				p.stateDir = dir + "/" + devT(p.dev) + "/device"
				p.state, _ = deviceAttr(ctx, v, p.stateDir+"/state")
			}
		}
	}
}

// at takes name and state from the device that was at the path's place, unless
// it is gone.
func (p *multipathPath) at(devices []host.BlockDevice, k pathPlace) bool {
	d, ok := blockDevice(devices, path.Base(k.link))
	if !ok || d.Node != k.node {
		return false
	}
	p.name, p.link = d.Name, k.link
	p.takeState(d)
	return true
}

func (p *multipathPath) takeState(d host.BlockDevice) {
	if p.state = d.State; p.state != "" {
		p.stateDir = d.Unit
	}
}

func blockDevice(devices []host.BlockDevice, name string) (host.BlockDevice, bool) {
	i, ok := slices.BinarySearchFunc(devices, name, func(d host.BlockDevice, name string) int { return strings.Compare(d.Name, name) })
	if !ok {
		return host.BlockDevice{}, false
	}
	return devices[i], true
}

// hear adds what multipathd says of the map; nil is nothing.
func (m *multipathMap) hear(said *multipathdMap) {
	if said == nil {
		return
	}
	m.queueing = shown(said.Queueing)
	if m.table == "" {
		m.queues = strings.Contains(said.Features, "queue_if_no_path")
	}
	for _, g := range said.Groups {
		for _, s := range g.Paths {
			dev, ok := parseDevT(s.DevT)
			i := slices.IndexFunc(m.paths, func(p multipathPath) bool { return ok && p.dev == dev })
			if i < 0 {
				continue
			}
			p := &m.paths[i]
			p.checker = s.Checker
			if p.kernel == "" && s.DMState != "undef" {
				p.kernel = s.DMState
			}
		}
	}
}

// deviceAttr reads one line of sysfs. An attribute the device does not have is
// empty; so is one of a device that is on its way out.
func deviceAttr(ctx context.Context, v host.Files, name string) (string, error) {
	data, err := v.ReadFileMax(ctx, name, 4096)
	return attrText(host.Attribute{Data: data, Err: err})
}

// attrText is deviceAttr for what was read already.
func attrText(a host.Attribute) (string, error) {
	switch err := a.Err; {
	case err == nil:
		return string(bytes.TrimSpace(a.Data)), nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOTDIR):
		return "", nil
	default:
		return "", err
	}
}

// label names a map in a metric: by its alias, or, where it is named by its WWID
// (user_friendly_names no), by the first 12 hex digits of the WWID's SHA-256. What
// is scraped is read by more people than the host is, and a WWID names the disk
// to the array.
func (m *multipathMap) label() string {
	if m.wwid == "" || !strings.Contains(m.name, shown(m.wwid)) {
		return m.name
	}
	sum := sha256.Sum256([]byte(m.wwid))
	return "wwid-" + hex.EncodeToString(sum[:6])
}

// describe names a map the way it must be looked up at night: by dm device, by
// identity and by what is mounted from it.
func (m *multipathMap) describe(ctx context.Context, mounts *mountsOver) string {
	more := []string{m.disk()}
	if m.name != shown(m.wwid) {
		more = append(more, shown(m.wwid))
	}
	if at := mounts.of(ctx, m.dev); at != "" {
		more = append(more, "mounted at "+shown(at))
	}
	return fmt.Sprintf("multipath map %s (%s)", m.name, strings.Join(more, ", "))
}

func (p Multipath) judgePaths(ctx context.Context, r *finding.Result, m *multipathMap, best int, mounts *mountsOver) {
	usable := m.usable()
	if usable == 0 {
		lost := "every read and write on it fails"
		if m.queues {
			lost = "I/O on it hangs"
		}
		r.Add(finding.Finding{
			Reason: "AllPathsFailed", Severity: finding.Critical, Subject: m.name,
			Message:  fmt.Sprintf("none of the %d paths of %s works: %s", len(m.paths), m.describe(ctx, mounts), lost),
			Evidence: m.pathEvidence("at least one path marked A"),
		})
		if m.queues {
			until := "until a path returns"
			if strings.HasSuffix(m.queueing, "sec") || strings.HasSuffix(m.queueing, "chk") {
				until = "until a path returns or no_path_retry runs out (" + m.queueing + ")"
			}
			e := []finding.Evidence{{Source: "device-mapper table of " + m.disk(), Observed: fmt.Sprintf("%.120s", m.table), Expected: "a working path, or no queue_if_no_path"}}
			if m.table == "" {
				e = e[:0]
			}
			if m.queueing != "" {
				e = append(e, finding.Evidence{Source: "multipathd, show maps json", Observed: "queueing " + m.queueing})
			}
			r.Add(finding.Finding{
				Reason: "QueueingWithoutPaths", Severity: finding.Critical, Subject: m.name,
				Message:  fmt.Sprintf("I/O on %s is queued although no path works: processes that use it hang and can not be killed %s", m.describe(ctx, mounts), until),
				Evidence: e,
			})
		}
		return
	}
	wanted, why := p.MinPaths, "minPaths"
	if wanted == 0 {
		wanted, why = max(best, len(m.paths)), "as many as it had at best"
	}
	if usable >= wanted {
		return
	}
	var bad []string
	for _, path := range m.paths {
		if path.failed() {
			bad = append(bad, path.name)
		}
	}
	detail := ""
	switch {
	case len(bad) > 0:
		detail = "; failed: " + shortList(bad, 4)
	case len(m.paths) < wanted:
		detail = fmt.Sprintf("; only %d are in the map", len(m.paths))
	}
	r.Add(finding.Finding{
		Reason: "PathsDegraded", Severity: finding.Warning, Subject: m.name,
		Message:  fmt.Sprintf("%d of %d paths of %s work%s", usable, wanted, m.describe(ctx, mounts), detail),
		Evidence: append(m.pathEvidence(fmt.Sprintf("%d paths marked A", wanted)), finding.Evidence{Source: "working paths", Observed: strconv.Itoa(usable), Expected: fmt.Sprintf("%d, %s", wanted, why)}),
	})
}

// pathEvidence shows what each witness says of a map's paths.
func (m *multipathMap) pathEvidence(wanted string) []finding.Evidence {
	var e []finding.Evidence
	if m.status != "" {
		e = append(e, finding.Evidence{Source: "device-mapper status of " + m.disk(), Observed: fmt.Sprintf("%.300s", strings.TrimSpace(m.status)), Expected: wanted})
	}
	var kernel, checker []string
	for _, p := range m.paths {
		switch {
		case p.gone:
			e = append(e, finding.Evidence{Source: "/sys/dev/block/" + devT(p.dev), Observed: "not there", Expected: "the path's disk"})
		case p.deviceDown() && len(e) < 9:
			e = append(e, finding.Evidence{Source: "/sys/block/" + p.name + "/device/state", Observed: p.state, Expected: "running"})
		}
		if m.status == "" && p.kernel != "" {
			kernel = append(kernel, p.name+" "+shown(p.kernel))
		}
		if p.checker != "" {
			checker = append(checker, p.name+" "+shown(p.checker))
		}
	}
	if kernel != nil {
		e = append(e, finding.Evidence{Source: "multipathd, show maps json, dm_st", Observed: shortList(kernel, 16), Expected: "active"})
	}
	if checker != nil {
		e = append(e, finding.Evidence{Source: "multipathd, show maps json, chk_st", Observed: shortList(checker, 16), Expected: "ready or ghost"})
	}
	if e == nil {
		e = append(e, finding.Evidence{Source: "/sys/block/" + m.disk() + "/slaves", Observed: "empty", Expected: "the map's paths"})
	}
	return e
}

// shortList joins names, at most n of them.
func shortList(names []string, n int) string {
	if len(names) <= n {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:n], ", "), len(names)-n)
}

// judgeSuspended looks a second time, in sysfs: a reload that was under way when
// the maps were listed is over by now.
func (p Multipath) judgeSuspended(ctx context.Context, v host.View, r *finding.Result, m *multipathMap, mounts *mountsOver) {
	if !m.suspended {
		return
	}
	source := "/sys/block/" + m.disk() + "/dm/suspended"
	now, err := deviceAttr(ctx, v, source)
	if err != nil || now != "1" {
		return
	}
	e := []finding.Evidence{{Source: source, Observed: "1", Expected: "0"}}
	if m.status != "" {
		e = append(e, finding.Evidence{Source: "device-mapper ioctl, flags of " + m.disk(), Observed: "suspended", Expected: "active"})
	}
	r.Add(finding.Finding{
		Reason: "MapSuspended", Severity: finding.Critical, Subject: m.name,
		Message:  fmt.Sprintf("%s is suspended: all I/O on it waits", m.describe(ctx, mounts)),
		Evidence: e,
	})
}

// localTargetNames begin the names of targets that replicate their volumes by
// themselves and serve each through one portal, which moves.
func localTargetNames() []string {
	return []string{
		"iqn.2019-10.io.longhorn:", "iqn.2014-09.com.rancher:", "nqn.2023-01.io.longhorn.spdk:",
		"iqn.2016-09.com.openebs.jiva:", "iqn.2016-09.com.openebs.cstor:", "nqn.2019-05.io.openebs:",
	}
}

// localTarget reports whether a target's disks must not be multipathed.
func localTarget(target string, more []string) bool {
	begins := func(prefix string) bool { return strings.HasPrefix(target, prefix) }
	return target != "" && (slices.ContainsFunc(localTargetNames(), begins) || slices.ContainsFunc(more, begins))
}

// judgeWanted finds maps over disks that must not be in one. The vendor does not
// tell: what calls itself IET may be a Longhorn replica or a real tgt array.
func (p Multipath) judgeWanted(ctx context.Context, r *finding.Result, m *multipathMap, targets iscsiTargets, mounts *mountsOver) (unwanted bool, err error) {
	for _, path := range m.paths {
		what, e, err := p.notForMultipath(ctx, path, len(m.paths), targets)
		if err != nil {
			return false, err
		}
		if what == "" {
			continue
		}
		r.Add(finding.Finding{
			Reason: "UnwantedMap", Severity: finding.Warning, Subject: m.name,
			Message:  fmt.Sprintf("%s lies over %s, %s: whoever mounts the disk itself is refused, since it is busy", m.describe(ctx, mounts), shown(path.name), what),
			Evidence: []finding.Evidence{e, {Source: "paths of the map", Observed: path.name, Expected: "no such disk in a multipath map"}},
		})
		return true, nil
	}
	return false, nil
}

// places is a fingerprint of the disks in a map.
func (m *multipathMap) places(s settled, sum uint64) uint64 {
	for _, p := range m.paths {
		sum = s.sum(sum, p.name, p.link)
	}
	return sum
}

func (p Multipath) notForMultipath(ctx context.Context, path multipathPath, paths int, targets iscsiTargets) (what string, e finding.Evidence, err error) {
	for _, kind := range []string{"rbd", "drbd", "nbd"} {
		if rest, ok := strings.CutPrefix(path.name, kind); ok && rest != "" && rest[0] >= '0' && rest[0] <= '9' {
			return kind + ", which replicates by itself", finding.Evidence{Source: "/sys/dev/block/" + devT(path.dev), Observed: path.name}, nil
		}
	}
	if v := targets.host; strings.HasPrefix(path.name, "nvme") {
		dir := "/sys/dev/block/" + devT(path.dev) + "/device"
		nqn, err := deviceAttr(ctx, v, dir+"/subsysnqn")
		if err != nil {
			return "", e, err
		}
		if localTarget(nqn, p.LocalTargets) {
			return "a volume that replicates itself", finding.Evidence{Source: dir + "/subsysnqn", Observed: shown(nqn)}, nil
		}
		transport, err := deviceAttr(ctx, v, dir+"/transport")
		if err != nil {
			return "", e, err
		}
		if transport == "pcie" && paths == 1 {
			return "a local NVMe disk with a single path", finding.Evidence{Source: dir + "/transport", Observed: transport}, nil
		}
		return "", e, nil
	}
	session := scsiTopology(path.link).session
	if session == "" {
		return "", e, nil
	}
	source, target, err := targets.of(ctx, session)
	if err != nil {
		return "", e, err
	}
	if localTarget(target, p.LocalTargets) {
		return "a volume that replicates itself (" + shown(shortTarget(target)) + ")", finding.Evidence{Source: source, Observed: shown(target)}, nil
	}
	return "", e, nil
}

// iscsiTargets remembers the target of each session for one pass: a few sessions
// carry thousands of paths.
type iscsiTargets struct {
	host  host.View
	names map[string]string
}

func (t iscsiTargets) of(ctx context.Context, session string) (source, target string, err error) {
	source = sessionsDir + "/" + session + "/targetname"
	target, ok := t.names[session]
	if !ok {
		if target, err = deviceAttr(ctx, t.host, source); err != nil {
			return source, "", err
		}
		t.names[session] = target
	}
	return source, target, nil
}

// scsiPlace is where a SCSI disk hangs, taken from its path in /sys/devices.
type scsiPlace struct {
	// session is "session1" for iSCSI, rport "rport-3:0-1" for Fibre Channel.
	session, rport string
	// port is host:channel:id, lun what follows.
	port, lun string
	usb       bool
}

func scsiTopology(link string) scsiPlace {
	var p scsiPlace
	for part := range strings.SplitSeq(link, "/") {
		switch {
		case strings.HasPrefix(part, "session"):
			p.session = part
		case strings.HasPrefix(part, "rport-"):
			p.rport = part
		case strings.HasPrefix(part, "usb"):
			p.usb = true
		case strings.Count(part, ":") == 3:
			i := strings.LastIndexByte(part, ':')
			p.port, p.lun = part[:i], part[i+1:]
		}
	}
	return p
}

// pathsOutsideMaps finds disks of one identity that no map holds together. Those
// that are evidently two disks with a copied identity are the disks probe's to
// tell; both go by the same evidence.
func pathsOutsideMaps(ctx context.Context, v host.View, r *finding.Result, disks []string, found []multipathMap) error {
	inMap := map[string]bool{}
	for _, m := range found {
		for _, p := range m.paths {
			inMap[p.name] = true
		}
	}
	devices, err := v.BlockDevices(ctx)
	if err != nil {
		return err
	}
	loose := map[string][]string{} // disks by identity
	for _, name := range disks {
		if strings.HasPrefix(name, "emcpower") || strings.HasPrefix(name, "VxDMP") {
			return nil // PowerPath and Veritas join paths without dm-multipath
		}
		if !strings.HasPrefix(name, "sd") || inMap[name] {
			continue
		}
		d, _ := blockDevice(devices, name)
		if wwid := cleanIdentity(d.WWID); wwid != "" {
			loose[wwid] = append(loose[wwid], name)
		}
	}
	if len(loose) == 0 {
		return nil
	}
	mapOf := map[string]*multipathMap{}
	for i := range found {
		// One path tells the map's identity in sysfs's spelling.
		for _, p := range found[i].paths {
			d, _ := blockDevice(devices, p.name)
			if wwid := cleanIdentity(d.WWID); wwid != "" {
				mapOf[wwid] = &found[i]
				break
			}
		}
	}
	for _, wwid := range slices.Sorted(maps.Keys(loose)) {
		names := loose[wwid]
		m := mapOf[wwid]
		if m != nil {
			names = append([]string{m.paths[0].name}, names...)
		}
		if len(names) < 2 {
			continue
		}
		what, same, err := sameDisk(ctx, v, names, m != nil)
		if err != nil {
			return err
		}
		if len(same) < 2 {
			continue
		}
		message := fmt.Sprintf("%s are paths to one disk and no multipath map joins them: there is no failover, and using them side by side corrupts data", shortList(same, 4))
		if m != nil {
			message = fmt.Sprintf("multipath map %s lacks paths to its disk, %s: they add no failover, and using them beside the map corrupts data", m.name, shortList(same[1:], 4))
		}
		r.Add(finding.Finding{
			Reason: "PathsNotMultipathed", Severity: finding.Warning, Subject: shown(wwid), Message: message,
			Evidence: []finding.Evidence{
				{Source: "/sys/block/*/device/wwid of " + shortList(same, 8), Observed: shown(wwid)},
				{Source: "size, target and LUN of " + same[0], Observed: what.String(), Expected: "one multipath map over all of them"},
			},
		})
	}
	return nil
}

// possiblePath is one of several disks with one identity.
type possiblePath struct {
	diskProof
	vendor, model string
	place         scsiPlace
}

func (f possiblePath) String() string {
	s := strconv.FormatUint(f.Sectors, 10) + " sectors, "
	if f.Target != "" {
		s += "target " + shown(f.Target)
	} else {
		s += "no target name"
	}
	if f.LUN != "" {
		s += ", LUN " + f.LUN
	}
	return s
}

// sameDisk returns those of the names, which have one identity, that by what the
// disks probe goes by are one disk, and that hang on different ports. With
// mapped the first name is a path of a map, and the others must be its disk.
func sameDisk(ctx context.Context, v host.View, names []string, mapped bool) (what possiblePath, same []string, err error) {
	var groups [][]possiblePath
	ports := map[string]bool{}
	for i, name := range names {
		f, running, err := possiblePathOf(ctx, v, name)
		if err != nil {
			return f, nil, err
		}
		switch {
		case f.Sectors == 0:
			continue // no medium: card readers and virtual media of a BMC
		case f.place.usb:
			continue // docks give all the disks in them one identity
		case !running && (i > 0 || !mapped):
			continue // left over from a path that is gone, or failing
		case f.place.port != "" && ports[f.place.port]:
			continue // two LUNs of one port are not two paths
		}
		ports[f.place.port] = true
		g := slices.IndexFunc(groups, func(g []possiblePath) bool {
			return f.vendor == g[0].vendor && f.model == g[0].model && f.LUN == g[0].LUN &&
				evidentlyTwo([]diskProof{g[0].diskProof, f.diskProof}) == ""
		})
		if g < 0 {
			groups = append(groups, []possiblePath{f})
		} else {
			groups[g] = append(groups[g], f)
		}
	}
	for _, g := range groups {
		if len(g) < 2 || mapped && g[0].Name != names[0] {
			continue
		}
		for _, f := range g {
			same = append(same, f.Name)
		}
		return g[0], same, nil
	}
	return possiblePath{}, nil, nil
}

func possiblePathOf(ctx context.Context, v host.View, name string) (f possiblePath, running bool, err error) {
	dir := "/sys/block/" + name
	f.disk = disk{Name: name, Kind: scsiDisk}
	if link, err := v.ReadLink(ctx, dir); err == nil {
		f.place = scsiTopology(link)
	}
	var errs []error
	attr := func(name string) string {
		s, err := deviceAttr(ctx, v, name)
		errs = append(errs, err)
		return s
	}
	f.Sectors, _ = strconv.ParseUint(attr(dir+"/size"), 10, 64)
	f.vendor, f.model, f.LUN = attr(dir+"/device/vendor"), attr(dir+"/device/model"), f.place.lun
	running = attr(dir+"/device/state") == "running"
	// Not every device has these pages.
	if page, err := v.ReadFileMax(ctx, dir+"/device/vpd_pg80", maxAttribute); err == nil {
		f.Serial = scsiSerial(page)
	}
	if page, err := v.ReadFileMax(ctx, dir+"/device/vpd_pg83", maxAttribute); err == nil {
		f.Port, _ = relativePort(page)
	}
	switch {
	case f.place.session != "":
		f.Target = attr(sessionsDir + "/" + f.place.session + "/targetname")
	case f.place.rport != "":
		f.Target, f.FC = attr("/sys/class/fc_remote_ports/"+f.place.rport+"/node_name"), true
	}
	return f, running, errors.Join(errs...)
}

// multipathDaemon is what was found out about multipathd.
type multipathDaemon struct {
	running, queued bool
	// state is its own word: "idle", "running", "configure", ...
	state string
	maps  []multipathdMap
	// conf is what confFrom was answered with.
	conf     multipathConfig
	confFrom string
	// silent is why it does not answer.
	silent error
	// address is what was dialled.
	address string
	// unit is nil where systemd could not be asked.
	unit *host.Unit
	// seen is false when the process table could not be read.
	seen bool
}

func (p Multipath) daemon(ctx context.Context, in Input, mapsExist, required bool, wanted RequiredMultipath) (multipathDaemon, error) {
	var d multipathDaemon
	procs, err := processesNamed(ctx, in.Host, func(comm string) bool { return comm == "multipathd" }, mapsExist)
	if err != nil {
		if !mapsExist && !required {
			return d, nil
		}
		return d, fmt.Errorf("whether multipathd runs: %w", err)
	}
	d.seen = true
	candidates := ofTheHost(ctx, in, procs)
	if len(candidates) == 0 && !mapsExist && !required {
		return d, nil
	}
	units, err := in.Host.Units(ctx, "multipathd.service")
	var unitErr error
	switch {
	case err == nil && len(units) == 1:
		d.unit = &units[0]
		d.queued = d.unit.Job
	case err != nil && !errors.Is(err, host.ErrNoSystemd) && !errors.Is(err, host.ErrNotLive):
		unitErr = fmt.Errorf("state of multipathd.service: %w", err)
	}
	// The client has the daemon's name (`multipathd show maps`), but one thread,
	// where the daemon has one each for checkers, uevents and clients.
	d.running = slices.ContainsFunc(candidates, func(c host.Process) bool {
		return c.Threads > 1 || d.unit != nil && d.unit.MainPID == c.PID
	})
	if d.queued || !d.running {
		return d, unitErr
	}
	if err := d.ask(ctx, in, mapsExist, wanted); err != nil {
		return d, errors.Join(unitErr, fmt.Errorf("asking multipathd: %w", err))
	}
	return d, unitErr
}

// ask talks to the daemon once. A daemon that does not serve is no error but a
// finding; the error is an answer that was not understood.
func (d *multipathDaemon) ask(parent context.Context, in Input, wantMaps bool, wanted RequiredMultipath) error {
	ctx, cancel := context.WithTimeout(parent, multipathdPatience)
	defer cancel()
	d.address = multipathdAbstract
	conn, err := dialMultipathd(ctx, in.Host)
	if err == nil {
		defer conn.Close()
		d.address = conn.address
		err = d.converse(conn, in.Memory, wantMaps, wanted)
	}
	switch {
	case parent.Err() != nil:
		return parent.Err()
	case errors.Is(err, host.ErrNotLive):
		if !wantMaps {
			return nil
		}
		return err
	case multipathdSilent(err):
		d.silent = err
		return nil
	}
	return err
}

func (d *multipathDaemon) converse(conn *multipathdConn, memory *Memory, wantMaps bool, wanted RequiredMultipath) error {
	// show daemon takes no lock, so that it is answered while maps are busy.
	text, err := conn.text("show daemon")
	if err != nil {
		return err
	}
	fields := strings.Fields(text) // "pid 349 idle"
	if len(fields) < 3 || fields[0] != "pid" {
		return fmt.Errorf("\"show daemon\" was answered with %.60q, want \"pid N STATE\"", text)
	}
	d.state = shown(fields[2])
	if wantMaps {
		if d.maps, err = conn.maps(memory); err != nil {
			return err
		}
	}
	if len(wanted.Defaults)+len(wanted.Devices) > 0 {
		d.confFrom = "show config local"
		if len(wanted.Devices) > 0 {
			// The local one leaves out devices that are not attached now.
			d.confFrom = "show config"
		}
		text, err := conn.text(d.confFrom)
		if err != nil {
			return err
		}
		if d.conf, err = parseMultipathConfig([]byte(text)); err != nil {
			return fmt.Errorf("%q: %w", d.confFrom, err)
		}
	}
	return nil
}

// daemonBusyFor is how long multipathd may be in a state other than idle and
// running.
const daemonBusyFor = time.Minute

func judgeDaemon(in Input, r *finding.Result, d multipathDaemon, existing int) {
	unitSays := finding.Evidence{Source: "multipathd.service", Expected: "active (running)"}
	if d.unit != nil {
		unitSays.Observed = fmt.Sprintf("%s (%s), %s", d.unit.Active, d.unit.Sub, d.unit.Load)
	}
	switch {
	case !d.seen || d.queued:
	case !d.running && existing > 0:
		e := []finding.Evidence{{Source: "process table", Observed: "no multipathd", Expected: "one"}}
		if d.unit != nil {
			e = append(e, unitSays)
		}
		r.Add(finding.Finding{
			Reason: "MultipathdDown", Severity: finding.Critical, Subject: "multipathd",
			Message:  fmt.Sprintf("multipathd does not run while there are multipath maps (%d): paths that fail are never brought back", existing),
			Evidence: e,
			Remedy:   &finding.Remedy{Action: "start-unit", Subject: "multipathd.service"},
			Settled:  d.unit != nil && downForGood(*d.unit),
		})
	case d.silent != nil:
		e := []finding.Evidence{{Source: d.address, Observed: d.silent.Error(), Expected: fmt.Sprintf("an answer within %s", multipathdPatience)}}
		if d.unit != nil {
			e = append(e, unitSays)
		}
		r.Add(finding.Finding{
			Reason: "MultipathdUnresponsive", Severity: finding.Warning, Subject: "multipathd",
			Message:  "multipathd runs but does not answer: failed paths may not be noticed or brought back",
			Evidence: e,
		})
	case d.state != "" && d.state != "idle" && d.state != "running":
		since := in.Memory.Since("daemon/"+d.state, in.Now)
		if lasted := in.Now.Sub(since); lasted >= daemonBusyFor {
			r.Add(finding.Finding{
				Reason: "MultipathdUnresponsive", Severity: finding.Warning, Subject: "multipathd",
				Message:  fmt.Sprintf("multipathd has been in state %q for %s: meanwhile it does not watch paths", d.state, lasted.Round(time.Second)),
				Evidence: []finding.Evidence{{Source: "multipathd, show daemon", Observed: d.state, Expected: "idle or running"}},
			})
		}
	}
}

// wantedSettings are those of the probe's own settings and of require.multipath.
func (p Multipath) wantedSettings(require Require) RequiredMultipath {
	w := require.Multipath
	if len(p.Settings) > 0 {
		w.Defaults = maps.Clone(p.Settings)
		maps.Copy(w.Defaults, require.Multipath.Defaults)
	}
	return w
}

func judgeMultipathSettings(r *finding.Result, d multipathDaemon, wanted RequiredMultipath) {
	if d.conf.sections == nil {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(wanted.Defaults)) {
		want := wanted.Defaults[key]
		got, ok := d.conf.setting(key)
		if ok && SameMultipathValue(got, want) {
			continue
		}
		if !ok {
			got = "not set"
		}
		r.Add(finding.Finding{
			Reason: "MultipathSettingMismatch", Severity: finding.Warning, Subject: key,
			Message:  fmt.Sprintf("multipathd runs with %s %q, and this host's storage needs %q", key, got, want),
			Evidence: []finding.Evidence{{Source: "multipathd, " + d.confFrom, Observed: key + " " + got, Expected: key + " " + want}},
		})
	}
	// One finding a device: what is not as it must be has one cause, the file
	// that should say it.
	for _, device := range wanted.Devices {
		var keys []string
		var e []finding.Evidence
		for _, key := range slices.Sorted(maps.Keys(device.Settings)) {
			want := device.Settings[key]
			got, ok := d.conf.deviceSetting(device.Vendor, device.Product, key)
			if ok && SameMultipathValue(got, want) {
				continue
			}
			if !ok {
				got = "not set"
			}
			keys = append(keys, key)
			e = append(e, finding.Evidence{Source: "multipathd, " + d.confFrom, Observed: key + " " + got, Expected: key + " " + want})
		}
		if len(keys) > 0 {
			name := device.Vendor + " " + device.Product
			r.Add(finding.Finding{
				Reason: "MultipathSettingMismatch", Severity: finding.Warning, Subject: name,
				Message:  fmt.Sprintf("multipathd does not handle %s as this host's storage needs it (%s)", name, shortList(keys, 4)),
				Evidence: e,
			})
		}
	}
}

// SameMultipathValue compares two values of multipath.conf and knows the
// spellings multipathd takes for one another: it prints find_multipaths "no" as "off".
func SameMultipathValue(a, b string) bool {
	plain := func(s string) string {
		switch s = strings.ToLower(strings.TrimSpace(s)); s {
		case "off":
			return "no"
		case "on":
			return "yes"
		}
		return s
	}
	return plain(a) == plain(b)
}

// mountsOver finds what is mounted from a map, once a message needs it.
type mountsOver struct {
	host host.View
	read bool
	at   map[host.DevNum][]string
}

// of returns the mount point of the device or of what lies directly over it: a
// partition, a logical volume. It is empty when that can not be known: it only
// helps to find one's way.
func (m *mountsOver) of(ctx context.Context, dev host.DevNum) string {
	if !m.read {
		m.read = true
		data, err := m.host.ReadFile(ctx, "/proc/1/mountinfo")
		if err != nil {
			return ""
		}
		infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(data), nil)
		if err != nil {
			return ""
		}
		m.at = map[host.DevNum][]string{}
		for _, i := range infos {
			d := host.DevNum{Major: uint32(i.Major), Minor: uint32(i.Minor)}
			m.at[d] = append(m.at[d], i.Mountpoint)
		}
	}
	if len(m.at) == 0 {
		return ""
	}
	points := m.at[dev]
	if points == nil {
		holders, err := m.host.ReadDir(ctx, fmt.Sprintf("/sys/block/dm-%d/holders", dev.Minor))
		if err != nil {
			return ""
		}
		for _, h := range holders {
			if s, err := deviceAttr(ctx, m.host, "/sys/block/"+h+"/dev"); err == nil {
				if d, ok := parseDevT(s); ok {
					points = append(points, m.at[d]...)
				}
			}
		}
	}
	return shortList(points, 1)
}

// parseMultipathStatus parses the status line of a multipath target:
//
//	FEATURES [f...] HANDLER_ARGS [h...] GROUPS NEXT_GROUP
//	  { A|D|E SELECTOR_ARGS [s...] PATHS ARGS_PER_PATH { MAJ:MIN A|F FAILS [p...] }... }...
//
// (drivers/md/dm-mpath.c, multipath_status). Groups that are all E, enabled, are
// no fault: a map that was just loaded has no active group before its first I/O.
func parseMultipathStatus(status string) ([]multipathPath, error) {
	t := dmTokens{rest: strings.TrimSpace(status)}
	paths := make([]multipathPath, 0, strings.Count(status, ":"))
	t.skip(t.count())
	t.skip(t.count())
	groups := t.count()
	t.skip(1)
	for range groups {
		t.skip(1)
		t.skip(t.count())
		n := t.count()
		args := t.count()
		for range n {
			number, mark := t.next(), t.next()
			t.skip(1 + args)
			dev, ok := parseDevT(number)
			if t.short || !ok || mark != "A" && mark != "F" {
				return nil, fmt.Errorf("%.120q is no status of a multipath map", status)
			}
			p := multipathPath{dev: dev, name: number, kernel: "active"}
			if mark == "F" {
				p.kernel = "failed"
			}
			paths = append(paths, p)
		}
	}
	if !t.done() {
		return nil, fmt.Errorf("%.120q is no status of a multipath map", status)
	}
	return paths, nil
}

// queuesWithoutPath reports whether queue_if_no_path is among the features that
// a multipath table begins with: "1 queue_if_no_path 0 2 1 ...".
func queuesWithoutPath(table string) bool {
	t := dmTokens{rest: strings.TrimSpace(table)}
	for range t.count() {
		if t.next() == "queue_if_no_path" {
			return true
		}
	}
	return false
}

// dmTokens are the words of a device-mapper line that are left; short once it
// ended early.
type dmTokens struct {
	rest  string
	short bool
}

func (t *dmTokens) next() string {
	t.rest = strings.TrimLeft(t.rest, " ")
	if t.rest == "" {
		t.short = true
		return ""
	}
	var word string
	word, t.rest, _ = strings.Cut(t.rest, " ")
	return word
}

// count reads a number of words or groups to come, of which there can be no more
// than words are left.
func (t *dmTokens) count() int {
	n, err := strconv.ParseUint(t.next(), 10, 16)
	if err != nil || int(n) > (len(t.rest)+1)/2 {
		t.short = true
		return 0
	}
	return int(n)
}

func (t *dmTokens) skip(n int) {
	for ; n > 0 && !t.short; n-- {
		t.next()
	}
}

// done reports whether the line had as many words as were asked for, no more.
func (t *dmTokens) done() bool { return !t.short && strings.TrimLeft(t.rest, " ") == "" }
