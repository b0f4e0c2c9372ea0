package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// ISCSI checks the iSCSI initiator: its sessions as the kernel has them, the
// daemon that brings them back, and its name.
//
// Nothing that may hold a CHAP secret is opened: not the session's username and
// password attributes, not iscsid.conf, not the node records.
type ISCSI struct {
	Common
	// MaxRecoveryTimeout is how long a session under a multipath map may hold
	// I/O back before multipath may try the next path.
	MaxRecoveryTimeout Duration `json:"maxRecoveryTimeout"`
}

// DefaultISCSI returns the default settings.
func DefaultISCSI() ISCSI { return ISCSI{MaxRecoveryTimeout: Duration(20 * time.Second)} }

// Name implements [Probe].
func (ISCSI) Name() string { return "iscsi" }

// Condition implements [Probe].
func (ISCSI) Condition() string { return ConditionPrefix + "ISCSIProblem" }

// Wakes implements [Probe]. A connection that is lost is no uevent; that the
// recovery timeout has run out is in the kernel's log alone.
func (ISCSI) Wakes(Require) Wakes {
	files := followed(initiatorNameFile, talosInitiatorNameFile)
	for _, dir := range nodeRecordDirs() {
		files = append(files, host.FollowedFile{Name: dir + "/"})
	}
	return Wakes{
		ISCSI:      true,
		Subsystems: []string{"iscsi_session", "iscsi_connection"},
		Units:      append([]string{"iscsid.service", "iscsid.socket"}, loginUnits()...),
		UnitFiles:  true, // whether the login unit is enabled
		Files:      files,
		KernelLog:  []string{"session recovery timed out", "detected conn error"},
		Processes:  []string{"iscsid"},
		// The kernel tells iscsid, and the state of the session is what iscsid makes
		// of it: 0.1 to 0.4 s later when a connection is lost, more after a login.
		After: 500 * time.Millisecond,
		Again: 2 * time.Second,
	}
}

// Rules implements [Probe].
func (ISCSI) Rules() []finding.Rule {
	return []finding.Rule{{
		Reason:     "IscsidDown",
		Severity:   finding.Critical,
		Means:      "iSCSI sessions exist and iscsid does not run: the kernel never reconnects by itself, so the next broken connection is lost for good.",
		Do:         "systemctl start iscsid.service; it takes the sessions over. Never restart iscsi.service or open-iscsi.service for it: stopping those logs out of every session.",
		HoldBefore: 15 * time.Second,
		HoldWhy:    "a crashed iscsid is started again within seconds, without a job that would be seen, and sessions live on meanwhile; told at once when systemd has given it up",
	}, {
		Reason:   "IscsidUnavailable",
		Severity: finding.Critical,
		Means:    "This host must be able to attach iSCSI volumes, and neither iscsid nor the socket that would start it is there.",
		Do:       "Install the initiator (open-iscsi, iscsi-initiator-utils) and `systemctl enable --now iscsid.socket`, or iscsid.service where it has no socket; where nothing is installed, PackageMissing says how it comes.",
	}, {
		Reason:     "SessionFailed",
		Severity:   finding.Critical,
		Also:       []finding.Severity{finding.Warning},
		Means:      "An iSCSI session has lost its connection: I/O on its disks waits until the recovery timeout and fails then. A warning while every disk of it has another working path in a multipath map.",
		Do:         "Check the way to the portal in the subject and the target behind it; iscsid's journal says why it can not log in again.",
		HoldBefore: iscsidStart,
		HoldClear:  15 * time.Second,
		HoldWhy:    "an iscsid that has just started lets go of every session and logs in again within seconds; told at once in all other cases, because I/O waits at once, also where it comes back within seconds as after a controller failover; a session that is thrown out right after login must hold one NOP-out round (5 s interval, 5 s timeout)",
	}, {
		Reason:   "InitiatorNameMissing",
		Severity: finding.Critical,
		Means:    "The initiator has no name: iscsid refuses to start or to log in.",
		Do:       "Put InitiatorName= with a name of this host alone into /etc/iscsi/initiatorname.iscsi, as `iscsi-iname` prints one, and have the storage allow it.",
	}, {
		Reason:   "InitiatorNameInvalid",
		Severity: finding.Critical,
		Means:    "The initiator's name is no iSCSI name (RFC 7143, 4.2.7): targets refuse it or take it for another one.",
		Do:       "Correct it in /etc/iscsi/initiatorname.iscsi while no session exists, restart iscsid, and have the storage allow the new name.",
	}, {
		Reason:   "InitiatorNameNotGenerated",
		Severity: finding.Warning,
		Means:    "The file still asks for the initiator's name to be generated: what reads it now, such as a CSI driver that registers the node, finds none.",
		Do:       "Start iscsid once (systemctl start iscsid.service): its start script generates the name.",
	}, {
		Reason:   "InitiatorNameChanged",
		Severity: finding.Warning,
		Means:    "Sessions exist under another initiator name than the file now gives: after the next login the storage may refuse this host its volumes.",
		Do:       "Restore the name the sessions use, or have the storage allow the new one before draining the node and logging in again.",
	}, {
		Reason:   "RecoveryTimeoutHigh",
		Severity: finding.Warning,
		Means:    "A session under a multipath map holds I/O back for long before it lets multipath try another path.",
		Do:       "Set node.session.timeo.replacement_timeout to 5 to 15 s in iscsid.conf and in the node records (`iscsiadm -m node -o update`), and log in again path by path. Not for a root disk on iSCSI without multipath.",
	}, {
		Reason:   "KernelModuleMissing",
		Severity: finding.Critical,
		Means:    "This host must be able to attach iSCSI volumes, and its kernel can not: iscsi_tcp is neither loaded nor loadable.",
		Do:       "modprobe iscsi_tcp and name it in /etc/modules-load.d; install the kernel's extra modules, remove the blacklisting, or reboot into the installed kernel.",
	}, {
		Reason:   "AutomaticLogin",
		Severity: finding.Info,
		Means:    "The login unit is enabled and node records outlive reboots: those with node.startup=automatic are logged in at boot, which waits for dead targets and competes with a CSI driver.",
		Do:       "`iscsiadm -m node -o show` says which records are automatic; delete those of volumes that are gone, and set the others that a CSI driver manages to manual.",
	}}
}

// Validate implements [Probe].
func (p ISCSI) Validate() error { return positive("maxRecoveryTimeout", p.MaxRecoveryTimeout) }

// Where the initiator keeps its name. The node records lie in /var/lib/iscsi
// upstream and in /etc/iscsi on Debian and Ubuntu.
const initiatorNameFile = "/etc/iscsi/initiatorname.iscsi"

// talosInitiatorNameFile is what Talos mounts into the container of iscsid, as
// its /etc/iscsi.
const talosInitiatorNameFile = "/system/iscsi/initiatorname.iscsi"

func nodeRecordDirs() []string { return []string{"/etc/iscsi/nodes", "/var/lib/iscsi/nodes"} }

// The units that log in to the automatic records.
func loginUnits() []string { return []string{"open-iscsi.service", "iscsi.service"} }

const (
	sessionsDir  = "/sys/class/iscsi_session"
	iscsiModule  = "iscsi_tcp"
	sessionAlive = "LOGGED_IN"
)

// Check implements [Probe].
func (p ISCSI) Check(ctx context.Context, in Input) (finding.Result, error) {
	var r finding.Result
	var errs []error
	sessions, err := iscsiSessions(ctx, in)
	if err != nil {
		return r, fmt.Errorf("iSCSI sessions: %w", err)
	}
	required := in.Require.HasPackage("iscsi") || in.Require.HasModule(iscsiModule) ||
		in.Require.HasUnit("iscsid.service") || in.Require.HasUnit("iscsid.socket")
	_, err = in.Host.Stat(ctx, "/sys/module/"+iscsiModule)
	loaded := err == nil
	daemon, daemonErr := iscsidState(ctx, in, len(sessions), required, len(sessions) > 0 || required || loaded)
	errs = append(errs, daemonErr)
	for _, proc := range daemon.procs {
		first := in.Memory.Since(fmt.Sprintf("iscsid %d %d", proc.PID, proc.StartTicks), in.Now)
		daemon.warm = daemon.warm || in.Now.Sub(first) >= iscsidStart
	}
	inUse := len(sessions) > 0 || required || daemon.running

	p.judgeIscsid(&r, daemon, len(sessions), required)
	if len(sessions) > 0 {
		errs = append(errs, p.judgeSessions(ctx, in.Host, &r, sessions, daemon.recovers()))
	}
	errs = append(errs, judgeInitiatorName(ctx, in, &r, sessions, inUse))
	if required && !loaded && len(sessions) == 0 {
		errs = append(errs, judgeISCSIModule(ctx, in, &r))
	}
	if inUse {
		errs = append(errs, judgeAutomaticLogin(ctx, in.Host, &r, daemon))
	}

	r.NotApplicable = !inUse && !loaded
	if r.NotApplicable {
		r.Summary = "no iSCSI session; iscsid is not running"
	} else {
		count := map[string]int{}
		for _, s := range sessions {
			count[s.label()]++
		}
		for _, state := range []string{"logged_in", "failed", "free", "unknown"} {
			r.Sample("hosthygiene_iscsi_sessions", float64(count[state]), "state", state)
		}
		r.Summary = fmt.Sprintf("iSCSI sessions logged in: %d of %d; %s", count["logged_in"], len(sessions), daemon)
		if len(sessions) == 0 {
			r.Summary = "no iSCSI session; " + daemon.String()
		}
	}
	return r, errors.Join(errs...)
}

// iscsiSession is one session in /sys/class/iscsi_session.
type iscsiSession struct {
	// number is that of "session3", which its connection "connection3:0" has too.
	number int
	// state is LOGGED_IN, FAILED (the connection is lost, I/O waits) or FREE
	// (the recovery timeout has run out, I/O fails); empty when neither the
	// session nor its connection tells.
	state string
	// byConnection: the session does not tell its state, its connection does.
	byConnection bool
	// initiator is the name this session logged in with.
	initiator string
	// recovery is recovery_tmo as it stands there.
	recovery string
}

func (s iscsiSession) dir() string { return sessionsDir + "/session" + strconv.Itoa(s.number) }

// label is the state as a metric label.
func (s iscsiSession) label() string {
	switch s.state {
	case sessionAlive:
		return "logged_in"
	case "FAILED":
		return "failed"
	case "FREE":
		return "free"
	}
	return "unknown"
}

func (s iscsiSession) failed() bool { return s.state == "FAILED" || s.state == "FREE" }

// keptSession is what is known of a session while it lives; the kernel gives no
// number twice.
type keptSession struct {
	// dir is its place below /sys/devices, half as far as over the class.
	dir string
	// initiator is read again after until: iscsid may set another name when it
	// restores a connection.
	initiator string
	until     time.Time
}

// sessionsKept is where they are remembered.
const sessionsKept = "iSCSI sessions"

// iscsiSessions lists the sessions; those that end meanwhile are left out.
func iscsiSessions(ctx context.Context, in Input) ([]iscsiSession, error) {
	v := in.Host
	names, err := v.ReadDir(ctx, sessionsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the transport module is not loaded
	}
	if err != nil {
		return nil, err
	}
	kept, ok := Kept[map[int]keptSession](in.Memory, sessionsKept)
	if !ok {
		kept = map[int]keptSession{}
		in.Memory.Keep(sessionsKept, kept)
	}
	sessions := make([]iscsiSession, 0, len(names))
	attributes := []string{"state", "recovery_tmo", "initiatorname"}
	for _, name := range names {
		digits, ok := strings.CutPrefix(name, "session")
		n, err := strconv.Atoi(digits)
		if !ok || err != nil {
			continue
		}
		s := iscsiSession{number: n}
		k, ok := kept[n]
		if !ok {
			k.dir = s.dir()
			if link, err := v.ReadLink(ctx, k.dir); err == nil && strings.HasPrefix(link, "../") {
				k.dir = path.Join(sessionsDir, link)
			}
		}
		if err := s.read(ctx, v, &k, attributes, in.Now); err != nil {
			return nil, err
		}
		if s.state == "" && s.recovery == "" && k.dir != s.dir() {
			// Another may have the number, after the module was loaded anew.
			k, s.initiator = keptSession{dir: s.dir()}, ""
			if err := s.read(ctx, v, &k, attributes, in.Now); err != nil {
				return nil, err
			}
		}
		if s.state == "" {
			if _, err := v.Stat(ctx, s.dir()); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			// Connections have a state since 5.8, sessions not on every kernel.
			s.byConnection = true
			connection, err := deviceAttr(ctx, v, s.connection()+"/state")
			if err != nil {
				return nil, err
			}
			switch connection {
			case "up":
				s.state = sessionAlive
			case "failed", "down":
				s.state = "FAILED"
			}
		}
		kept[n] = k
		sessions = append(sessions, s)
	}
	slices.SortFunc(sessions, func(a, b iscsiSession) int { return a.number - b.number })
	if len(kept) > len(sessions) {
		maps.DeleteFunc(kept, func(n int, _ keptSession) bool {
			_, lives := slices.BinarySearchFunc(sessions, n, func(s iscsiSession, n int) int { return s.number - n })
			return !lives
		})
	}
	return sessions, nil
}

// read reads what may change, and the initiator's name when it is due.
func (s *iscsiSession) read(ctx context.Context, v host.View, k *keptSession, attributes []string, now time.Time) error {
	if now.Before(k.until) && k.until.Sub(now) <= 2*settledFor {
		attributes, s.initiator = attributes[:2], k.initiator
	}
	read := v.ReadAttributes(ctx, k.dir, attributes...)
	for i, text := range []*string{&s.state, &s.recovery, &s.initiator}[:len(read)] {
		var err error
		if *text, err = attrText(read[i]); err != nil {
			return err
		}
	}
	if len(read) == 3 && s.initiator != "" {
		k.initiator = s.initiator
		k.until = now.Add(settledFor + time.Duration(uint64(s.number)*2654435769%uint64(settledFor)))
	}
	return nil
}

func (s iscsiSession) connection() string {
	return fmt.Sprintf("/sys/class/iscsi_connection/connection%d:0", s.number)
}

// subject names a session for people and from one login to the next: the
// target's own part of its name and the portal. The kernel's number changes.
func (s iscsiSession) subject(ctx context.Context, v host.View) (string, error) {
	target, errT := deviceAttr(ctx, v, s.dir()+"/targetname")
	address, errA := deviceAttr(ctx, v, s.connection()+"/persistent_address")
	port, errP := deviceAttr(ctx, v, s.connection()+"/persistent_port")
	iface, errI := deviceAttr(ctx, v, s.dir()+"/ifacename")
	if err := errors.Join(errT, errA, errP, errI); err != nil {
		return "", err
	}
	if target == "" {
		return "session" + strconv.Itoa(s.number), nil
	}
	subject := shown(shortTarget(target))
	if address != "" {
		if strings.Contains(address, ":") {
			address = "[" + address + "]"
		}
		subject += " at " + shown(address+":"+port)
	}
	if iface != "" && iface != "default" {
		subject += " via " + shown(iface)
	}
	return subject, nil
}

// shortTarget is the part of a target name its owner chose, without the naming
// authority: "pvc-12" of "iqn.2019-10.io.longhorn:pvc-12".
func shortTarget(name string) string {
	if _, own, ok := strings.Cut(name, ":"); ok && own != "" {
		return own
	}
	return name
}

// iscsidView is what was found out about iscsid.
type iscsidView struct {
	running bool
	// known is false where processes could not be listed.
	known bool
	// units is empty where systemd could not be asked; live is false where
	// there is no running systemd to ask.
	units map[string]host.Unit
	live  bool
	// queued: systemd is starting or stopping it.
	queued bool
	// procs are its processes; warm: one of them has run for iscsidStart.
	procs []host.Process
	warm  bool
}

// iscsidStart is how long an iscsid that has just started may take to log in
// again to the sessions it found.
const iscsidStart = 15 * time.Second

// recovers reports whether sessions are out of use because iscsid is being
// restarted: it logs in to all of them again when it starts.
func (d iscsidView) recovers() bool {
	if !d.known || d.warm {
		return false
	}
	return d.running || d.live && d.units != nil && !downForGood(d.units["iscsid.service"])
}

// String is for the summary.
func (d iscsidView) String() string {
	switch {
	case d.running:
		return "iscsid is running"
	case d.queued:
		return "iscsid is being started or stopped"
	case d.units["iscsid.socket"].Running():
		return "iscsid will be started by its socket"
	case !d.known:
		return "iscsid could not be looked for"
	}
	return "iscsid is not running"
}

// iscsidState looks for the daemon. It is needed where there are sessions, and
// where iSCSI is required and no socket would start it.
func iscsidState(ctx context.Context, in Input, sessions int, required, matters bool) (iscsidView, error) {
	var d iscsidView
	var err error
	v := in.Host
	look := func(needed bool) {
		var procs []host.Process
		procs, err = processesNamed(ctx, v, func(comm string) bool { return comm == "iscsid" }, needed)
		d.procs = ofTheHost(ctx, in, procs)
		d.running = len(d.procs) > 0
	}
	look(sessions > 0)
	if err != nil {
		if !matters {
			return d, nil
		}
		return d, fmt.Errorf("whether iscsid runs: %w", err)
	}
	d.known = true
	if !matters && !d.running {
		return d, nil
	}
	units, err := v.Units(ctx, append([]string{"iscsid.service", "iscsid.socket"}, loginUnits()...)...)
	switch {
	case errors.Is(err, host.ErrNoSystemd):
		d.live = true
		return d, nil
	case errors.Is(err, host.ErrNotLive) && d.running:
		return d, nil
	case err != nil:
		return d, fmt.Errorf("state of iscsid's units: %w", err)
	}
	d.live = true
	d.units = make(map[string]host.Unit, len(units))
	for _, u := range units {
		d.units[u.Name] = u
	}
	d.queued = d.units["iscsid.service"].Job || d.units["iscsid.socket"].Job
	if required && !d.running && !d.units["iscsid.socket"].Running() {
		if look(true); err != nil {
			return d, fmt.Errorf("whether iscsid runs: %w", err)
		}
	}
	return d, nil
}

func (p ISCSI) judgeIscsid(r *finding.Result, d iscsidView, sessions int, required bool) {
	if !d.known || d.running || d.queued {
		return
	}
	e := []finding.Evidence{{Source: "process table", Observed: "no iscsid", Expected: "one"}}
	for _, name := range []string{"iscsid.service", "iscsid.socket"} {
		if u, ok := d.units[name]; ok {
			e = append(e, finding.Evidence{Source: name, Observed: fmt.Sprintf("%s (%s), %s", u.Active, u.Sub, u.Load)})
		}
	}
	switch {
	case sessions > 0:
		// An active socket is no excuse here: the kernel reports a lost
		// connection over netlink, which starts nothing.
		r.Add(finding.Finding{
			Reason: "IscsidDown", Severity: finding.Critical, Subject: "iscsid",
			Message:  fmt.Sprintf("iscsid does not run while there are iSCSI sessions (%d): a connection that breaks is never restored", sessions),
			Evidence: e,
			Remedy:   &finding.Remedy{Action: "start-unit", Subject: "iscsid.service"},
			Settled:  downForGood(d.units["iscsid.service"]),
		})
	case required && d.live && !d.units["iscsid.socket"].Running():
		f := finding.Finding{
			Reason: "IscsidUnavailable", Severity: finding.Critical, Subject: "iscsid",
			Message:  "iSCSI is required here, and neither iscsid nor its socket is active: no volume can be attached",
			Evidence: e,
		}
		if u, ok := d.units["iscsid.socket"]; ok && u.Load == "loaded" {
			f.Remedy = &finding.Remedy{Action: "start-unit", Subject: u.Name}
		}
		r.Add(f)
	}
}

// iscsiPaths tells which sessions carry paths of multipath maps.
type iscsiPaths struct {
	maps []multipathMap
	// mapOf finds the map of a disk, behind the sessions under any map.
	mapOf  map[string]*multipathMap
	behind map[string]bool
}

func readISCSIPaths(ctx context.Context, v host.View) (iscsiPaths, error) {
	paths := iscsiPaths{mapOf: map[string]*multipathMap{}, behind: map[string]bool{}}
	disks, err := blockNames(ctx, v)
	if err != nil {
		return paths, err
	}
	if paths.maps, err = sysfsMultipathMaps(ctx, v, disks); err != nil {
		return paths, err
	}
	for i := range paths.maps {
		m := &paths.maps[i]
		for j := range m.paths {
			path := &m.paths[j]
			paths.mapOf[path.name] = m
			link, err := v.ReadLink(ctx, "/sys/block/"+path.name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return paths, err
			}
			path.link = link
			if s := scsiTopology(link).session; s != "" {
				paths.behind[s] = true
			}
		}
	}
	return paths, nil
}

func (p ISCSI) judgeSessions(ctx context.Context, v host.View, r *finding.Result, sessions []iscsiSession, recovers bool) error {
	var errs []error
	// What lies over the sessions matters only where one of them is not as it
	// should be, and takes four times as long to find out as their state.
	if !slices.ContainsFunc(sessions, func(s iscsiSession) bool { return s.state != sessionAlive || p.holdsBackLong(s) }) {
		return nil
	}
	paths, err := readISCSIPaths(ctx, v)
	if err != nil {
		errs = append(errs, err)
	}
	down := map[string]bool{}
	unknown := 0
	for _, s := range sessions {
		down["session"+strconv.Itoa(s.number)] = s.failed()
		if s.label() == "unknown" {
			unknown++
		}
	}
	if unknown > 0 {
		errs = append(errs, fmt.Errorf("the kernel does not tell the state of some iSCSI sessions (%d)", unknown))
	}

	failed := map[string]finding.Finding{}
	var kernel map[string]multipathMap
	for _, s := range sessions {
		if !s.failed() {
			continue
		}
		if kernel == nil {
			kernel = kernelMaps(ctx, v)
		}
		f, err := p.sessionFailed(ctx, v, s, paths, down, kernel)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Several sessions between the same ends (node.session.nr_sessions)
		// are told as one.
		f.Settled = !recovers
		if other, ok := failed[f.Subject]; ok {
			if other.Severity.Rank() > f.Severity.Rank() {
				f, other = other, f
			}
			f.Evidence = append(f.Evidence, other.Evidence...)
		}
		failed[f.Subject] = f
	}
	for _, f := range failed {
		r.Add(f)
	}
	errs = append(errs, p.judgeRecovery(ctx, v, r, sessions, paths))
	return errors.Join(errs...)
}

// kernelMaps are the maps by wwid as the device-mapper itself sees them; empty
// where it may not be asked.
func kernelMaps(ctx context.Context, v host.View) map[string]multipathMap {
	byWWID := map[string]multipathMap{}
	disks, err := blockNames(ctx, v)
	if err != nil {
		return byWWID
	}
	found, _ := multipathMaps(ctx, v, nil, disks)
	for _, m := range found {
		byWWID[m.wwid] = m
	}
	return byWWID
}

func (p ISCSI) sessionFailed(ctx context.Context, v host.View, s iscsiSession, paths iscsiPaths, down map[string]bool, kernel map[string]multipathMap) (finding.Finding, error) {
	subject, err := s.subject(ctx, v)
	if err != nil {
		return finding.Finding{}, err
	}
	disks, err := s.disks(ctx, v)
	if err != nil {
		return finding.Finding{}, err
	}
	f := finding.Finding{
		Reason: "SessionFailed", Severity: finding.Critical, Subject: subject,
		Evidence: []finding.Evidence{{Source: s.dir() + "/state", Observed: shown(s.state), Expected: sessionAlive}},
	}
	if s.byConnection {
		f.Evidence = nil
	}
	if c, err := deviceAttr(ctx, v, s.connection()+"/state"); err == nil && c != "" {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: s.connection() + "/state", Observed: c, Expected: "up"})
	}
	covered := len(disks) > 0
	for _, disk := range disks {
		other := livingPath(paths.mapOf[disk], kernel, down)
		observed := "in no multipath map with another working path"
		if other != "" {
			observed = "multipath map " + paths.mapOf[disk].name + " goes on over " + other
		}
		covered = covered && other != ""
		if len(f.Evidence) < 12 {
			f.Evidence = append(f.Evidence, finding.Evidence{Source: "/sys/block/" + disk + "/holders", Observed: observed})
		}
	}
	state := "has lost its connection"
	effect := "I/O on " + shortList(disks, 4) + " waits until the recovery timeout and then fails"
	if s.state == "FREE" {
		state = "could not be restored within its recovery timeout"
		effect = "I/O on " + shortList(disks, 4) + " fails"
	}
	switch {
	case len(disks) == 0:
		effect = "no disk of it is left"
	case covered:
		f.Severity = finding.Warning
		effect = "multipath goes on over other paths"
	}
	f.Message = fmt.Sprintf("iSCSI session to %s %s: %s", subject, state, effect)
	return f, nil
}

// livingPath names a path of the map that works and does not go through a failed
// session.
func livingPath(m *multipathMap, kernel map[string]multipathMap, down map[string]bool) string {
	if m == nil {
		return ""
	}
	k, asked := kernel[m.wwid]
	for _, path := range m.paths {
		if down[scsiTopology(path.link).session] {
			continue
		}
		if !asked {
			return path.name
		}
		i := slices.IndexFunc(k.paths, func(o multipathPath) bool { return o.dev == path.dev })
		if i >= 0 && !k.paths[i].failed() && k.paths[i].state != "blocked" {
			return path.name
		}
	}
	return ""
}

// disks lists the session's disks: session/targetH:C:I/H:C:I:L/block/sdX.
func (s iscsiSession) disks(ctx context.Context, v host.View) ([]string, error) {
	var all []string
	targets, err := ls(ctx, v, s.dir()+"/device", "target")
	if err != nil {
		return nil, err
	}
	for _, target := range targets {
		units, err := ls(ctx, v, target, strings.TrimPrefix(path.Base(target), "target")+":")
		if err != nil {
			return nil, err
		}
		for _, unit := range units {
			disks, err := ls(ctx, v, unit+"/block", "")
			if err != nil {
				return nil, err
			}
			for _, d := range disks {
				all = append(all, path.Base(d))
			}
		}
	}
	return all, nil
}

// ls lists the entries of a directory that begin so, with their full names; a
// directory that is gone has none.
func ls(ctx context.Context, v host.View, dir, prefix string) ([]string, error) {
	names, err := v.ReadDir(ctx, dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []string
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			found = append(found, dir+"/"+n)
		}
	}
	return found, nil
}

// judgeRecovery tells all sessions that hold I/O back for too long in one
// finding: they have one cause, the configuration they were made with.
func (p ISCSI) judgeRecovery(ctx context.Context, v host.View, r *finding.Result, sessions []iscsiSession, paths iscsiPaths) error {
	if len(paths.behind) == 0 {
		return nil
	}
	var e []finding.Evidence
	high := 0
	for _, s := range sessions {
		if !paths.behind["session"+strconv.Itoa(s.number)] {
			continue
		}
		if !p.holdsBackLong(s) {
			continue
		}
		source, text := s.dir()+"/recovery_tmo", s.recovery
		target, err := deviceAttr(ctx, v, s.dir()+"/targetname")
		if err != nil {
			return err
		}
		if localTarget(target, nil) {
			continue // the map over it should not be there, which multipath tells
		}
		high++
		if len(e) < 8 {
			e = append(e, finding.Evidence{Source: source + " (" + shown(shortTarget(target)) + ")", Observed: shown(text), Expected: fmt.Sprintf("at most %.0f s under multipath", p.MaxRecoveryTimeout.D().Seconds())})
		}
	}
	if high == 0 {
		return nil
	}
	r.Add(finding.Finding{
		Reason: "RecoveryTimeoutHigh", Severity: finding.Warning, Subject: "node.session.timeo.replacement_timeout",
		Message:  fmt.Sprintf("iSCSI sessions under multipath (%d) hold I/O back for more than %s after a lost connection, before another path is tried", high, p.MaxRecoveryTimeout),
		Evidence: e,
	})
	return nil
}

// holdsBackLong reports whether a session holds I/O back for longer than one
// under a multipath map should.
func (p ISCSI) holdsBackLong(s iscsiSession) bool {
	timeout, endless, ok := parseRecoveryTimeout(s.recovery)
	return ok && (endless || timeout > p.MaxRecoveryTimeout.D())
}

// parseRecoveryTimeout reads recovery_tmo: seconds, 0 for none at all, "off" or
// a negative number for waiting without end (scsi_transport_iscsi.c).
func parseRecoveryTimeout(text string) (timeout time.Duration, endless, ok bool) {
	if text == "off" {
		return 0, true, true
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		return 0, false, false
	}
	return time.Duration(n) * time.Second, n < 0, true
}

// judgeInitiatorName reads the initiator's name. The name itself stands in
// evidence only; what leaves the host is its hash, by which two nodes with one
// name are found.
func judgeInitiatorName(ctx context.Context, in Input, r *finding.Result, sessions []iscsiSession, inUse bool) error {
	from := initiatorNameFile
	data, err := in.Host.ReadFileMax(ctx, from, 64<<10)
	missing := errors.Is(err, fs.ErrNotExist)
	if missing {
		if data, err = in.Host.ReadFileMax(ctx, talosInitiatorNameFile, 64<<10); !errors.Is(err, fs.ErrNotExist) {
			from, missing = talosInitiatorNameFile, false
		}
	}
	if err != nil && !missing {
		if !inUse {
			return nil
		}
		return fmt.Errorf("the initiator's name: %w", err)
	}
	file := parseInitiatorName(data)
	if len(file.names) > 0 {
		r.Sample("hosthygiene_iscsi_initiator_info", 1, "hash", identityHash(file.names[0]))
	}
	if !inUse {
		return nil
	}
	add := func(reason string, severity finding.Severity, message string, observed, expected string) {
		r.Add(finding.Finding{
			Reason: reason, Severity: severity, Subject: from, Message: message,
			Evidence: []finding.Evidence{{Source: from, Observed: observed, Expected: expected}},
		})
	}
	switch {
	case missing:
		add("InitiatorNameMissing", finding.Critical, "the iSCSI initiator has no name, since its file is missing: iscsid does not start, and no volume can be attached", "no such file", "InitiatorName=iqn...")
		return nil
	case file.generate:
		add("InitiatorNameNotGenerated", finding.Warning, "the iSCSI initiator's name has not been generated yet: whoever reads it now finds none, or one that the next start of iscsid replaces", "GenerateName=yes", "InitiatorName=iqn...")
		return nil
	case len(file.names) == 0:
		add("InitiatorNameMissing", finding.Critical, "the iSCSI initiator has no name, since its file gives none: iscsid does not start, and no volume can be attached", "no InitiatorName= line", "InitiatorName=iqn...")
		return nil
	}
	name := file.names[0]
	for _, other := range file.names[1:] {
		if other != name {
			add("InitiatorNameInvalid", finding.Critical, "the iSCSI initiator's file gives several different names: which one counts depends on who reads it", shown(strings.Join(file.names, " and ")), "one name")
			return nil
		}
	}
	if err := validISCSIName(name); err != nil {
		add("InitiatorNameInvalid", finding.Critical, fmt.Sprintf("the iSCSI initiator's name is not valid, since %s: targets refuse it or take it for another", err), strconv.Quote(name), "a name as in RFC 7143, 4.2.7")
		return nil
	}
	return judgeNameChange(ctx, in, r, sessions, name, from)
}

func judgeNameChange(ctx context.Context, in Input, r *finding.Result, sessions []iscsiSession, name, from string) error {
	var e []finding.Evidence
	changed := 0
	kept, _ := Kept[map[int]keptSession](in.Memory, sessionsKept)
	for _, s := range sessions {
		if s.initiator == "" || strings.EqualFold(s.initiator, name) {
			continue
		}
		delete(kept, s.number) // what is wrong is looked at in every pass
		// An interface record may give its sessions a name of its own
		// (iface.initiatorname).
		iface, err := deviceAttr(ctx, in.Host, s.dir()+"/ifacename")
		if err != nil {
			return err
		}
		if iface != "" && iface != "default" {
			continue
		}
		changed++
		if len(e) < 4 {
			e = append(e, finding.Evidence{Source: s.dir() + "/initiatorname", Observed: shown(s.initiator), Expected: name + " as in " + from})
		}
	}
	if changed > 0 {
		r.Add(finding.Finding{
			Reason: "InitiatorNameChanged", Severity: finding.Warning, Subject: from,
			Message:  fmt.Sprintf("the iSCSI initiator's name was changed under existing sessions (%d): after their next login the storage may refuse this host", changed),
			Evidence: e,
		})
	}
	return nil
}

// initiatorName is what initiatorname.iscsi says.
type initiatorName struct {
	names []string
	// generate is GenerateName=yes: Debian's start script has not yet replaced
	// the file by one with a name.
	generate bool
}

// parseInitiatorName reads it as open-iscsi does: '#' begins a comment only in
// front of the key, blanks around the value do not count.
func parseInitiatorName(data []byte) initiatorName {
	var f initiatorName
	for line := range bytes.Lines(data) {
		key, value, ok := strings.Cut(string(line), "=")
		if !ok || strings.Contains(key, "#") {
			continue
		}
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "InitiatorName":
			if value != "" {
				f.names = append(f.names, value)
			}
		case "GenerateName":
			f.generate = value == "yes"
		}
	}
	return f
}

var (
	iqnForm = regexp.MustCompile(`^iqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:.+)?$`)
	euiForm = regexp.MustCompile(`^eui\.[0-9A-Fa-f]{16}$`)
	naaForm = regexp.MustCompile(`^naa\.([0-9A-Fa-f]{16}|[0-9A-Fa-f]{32})$`)
)

// validISCSIName holds a name against RFC 7143, 4.2.7. Upper case is let pass:
// it is folded to lower case in comparisons (RFC 3722) and common.
func validISCSIName(name string) error {
	if len(name) > 223 {
		return fmt.Errorf("it has %d bytes and may have 223", len(name))
	}
	for _, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == ':':
		case c > 0x7f && c != 0xfffd:
		default:
			return fmt.Errorf("it contains %q", c)
		}
	}
	if !iqnForm.MatchString(name) && !euiForm.MatchString(name) && !naaForm.MatchString(name) {
		return errors.New("it is not of the form iqn.YYYY-MM.DOMAIN:NAME, eui.HEX or naa.HEX")
	}
	return nil
}

// judgeISCSIModule asks whether the kernel could load iscsi_tcp.
func judgeISCSIModule(ctx context.Context, in Input, r *finding.Result) error {
	o, err := in.Host.OS(ctx)
	if err != nil {
		return fmt.Errorf("which kernel runs: %w", err)
	}
	missing := func(message string, remedy bool, e finding.Evidence) {
		f := finding.Finding{
			Reason: "KernelModuleMissing", Severity: finding.Critical, Subject: iscsiModule, Message: message,
			Evidence: []finding.Evidence{{Source: "/sys/module/" + iscsiModule, Observed: "not there", Expected: "loaded or loadable"}, e},
		}
		if remedy {
			f.Remedy = &finding.Remedy{Action: "load-module", Subject: iscsiModule}
		}
		r.Add(f)
	}
	dir, dep, builtin, err := kernelModules(ctx, in.Host, o.Kernel)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		missing(fmt.Sprintf("the kernel module iscsi_tcp is not loaded, and the modules of the running kernel %s are not installed: no iSCSI volume can be attached", o.Kernel), false,
			finding.Evidence{Source: dir, Observed: "not there", Expected: "the modules of the running kernel"})
		return nil
	case err != nil:
		return fmt.Errorf("modules of kernel %s: %w", o.Kernel, err)
	}
	if listsModule(builtin, iscsiModule) {
		return nil
	}
	if !listsModule(dep, iscsiModule) {
		missing(fmt.Sprintf("the running kernel %s has no module iscsi_tcp: no iSCSI volume can be attached", o.Kernel), false,
			finding.Evidence{Source: dir + "/modules.dep", Observed: "no iscsi_tcp", Expected: "iscsi_tcp.ko"})
		return nil
	}
	// iscsid loads it by itself and honours the blacklist in doing so.
	where, line, err := moduleForbidden(ctx, in.Host, iscsiModule)
	if err != nil {
		return err
	}
	switch {
	case where != "":
		missing("the kernel module iscsi_tcp is forbidden by modprobe's configuration: no iSCSI volume can be attached", false,
			finding.Evidence{Source: where, Observed: shown(line), Expected: "no such line"})
	case in.Require.HasModule(iscsiModule):
		missing("the kernel module iscsi_tcp is required to be loaded and is not", true,
			finding.Evidence{Source: dir + "/modules.dep", Observed: "iscsi_tcp is there"})
	}
	return nil
}

// kernelModules reads the module lists of a kernel release. Hosts without a
// merged /usr have them in /lib only, others in both.
func kernelModules(ctx context.Context, v host.View, release string) (dir string, dep, builtin []byte, err error) {
	for _, dir = range []string{"/usr/lib/modules/" + release, "/lib/modules/" + release, "/run/booted-system/kernel-modules/lib/modules/" + release} {
		dep, err = v.ReadFile(ctx, dir+"/modules.dep")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return dir, nil, nil, err
		}
		builtin, err = v.ReadFile(ctx, dir+"/modules.builtin")
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return dir, dep, builtin, err
	}
	return "/lib/modules/" + release, nil, nil, fs.ErrNotExist
}

// listsModule looks for NAME.ko, compressed or not, at the beginning of a line
// of modules.dep or modules.builtin. Names of files may have '-' for '_'.
func listsModule(list []byte, name string) bool {
	for line := range bytes.Lines(list) {
		file, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		base := file[bytes.LastIndexByte(file, '/')+1:]
		stem, _, ok := bytes.Cut(base, []byte(".ko"))
		if ok && strings.ReplaceAll(string(stem), "-", "_") == name {
			return true
		}
	}
	return false
}

// moduleForbidden looks for what keeps modprobe from loading a module:
// "blacklist NAME", and "install NAME" with a command that loads nothing
// (modprobe.d(5)). A file in a directory named earlier hides those of its name
// in later ones.
func moduleForbidden(ctx context.Context, v host.View, name string) (where, line string, err error) {
	seen := map[string]bool{}
	for _, dir := range []string{"/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"} {
		files, err := ls(ctx, v, dir, "")
		if err != nil {
			return "", "", err
		}
		for _, file := range files {
			base := path.Base(file)
			if !strings.HasSuffix(base, ".conf") || seen[base] {
				continue
			}
			seen[base] = true
			data, err := v.ReadFileMax(ctx, file, 1<<20)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return "", "", err
			}
			if line := forbids(data, name); line != "" {
				return file, line, nil
			}
		}
	}
	return "", "", nil
}

func forbids(conf []byte, name string) string {
	for raw := range bytes.Lines(conf) {
		f := strings.Fields(string(raw))
		if len(f) < 2 || strings.ReplaceAll(f[1], "-", "_") != name {
			continue
		}
		if f[0] == "blacklist" || f[0] == "install" && len(f) > 2 && slices.Contains([]string{"true", "false", ":"}, path.Base(f[2])) {
			return strings.Join(f, " ")
		}
	}
	return ""
}

// judgeAutomaticLogin tells that boot may log in to targets. Which records are
// automatic stands inside the records, beside CHAP passwords, and so is not
// read: only that a login unit is enabled and that records outlived the boot,
// which a CSI driver's own do not when it detaches its volumes.
func judgeAutomaticLogin(ctx context.Context, v host.View, r *finding.Result, d iscsidView) error {
	unit := ""
	for _, name := range loginUnits() {
		if u := d.units[name]; u.Load == "loaded" && strings.HasPrefix(u.FileState, "enabled") {
			unit = name
			break
		}
	}
	if unit == "" {
		return nil
	}
	for _, dir := range nodeRecordDirs() {
		targets, err := ls(ctx, v, dir, "")
		if err != nil {
			return fmt.Errorf("iSCSI node records: %w", err)
		}
		if len(targets) == 0 {
			continue
		}
		o, err := v.OS(ctx)
		if err != nil {
			return fmt.Errorf("when this host booted: %w", err)
		}
		old := 0
		for _, target := range targets {
			st, err := v.Lstat(ctx, target)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("iSCSI node records: %w", err)
			}
			if st.ModTime.Before(o.BootTime) {
				old++
			}
		}
		if old == 0 {
			continue
		}
		r.Add(finding.Finding{
			Reason: "AutomaticLogin", Severity: finding.Info, Subject: unit,
			Message: fmt.Sprintf("%s is enabled and node records are left from before this boot (targets: %d): those set to automatic are logged in at boot, which waits for targets that are gone", unit, old),
			Evidence: []finding.Evidence{
				{Source: unit, Observed: "enabled"},
				{Source: dir, Observed: fmt.Sprintf("records of %d targets, %d of them older than the boot at %s", len(targets), old, o.BootTime.UTC().Format(time.RFC3339)), Expected: "none that outlive a reboot, where a CSI driver attaches volumes"},
			},
		})
		return nil
	}
	return nil
}
