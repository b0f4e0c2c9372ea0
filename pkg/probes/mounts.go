package probes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/moby/sys/mountinfo"

	"github.com/hosthygiene/agent/pkg/host"
)

// mount is one line of a mount table.
type mount struct {
	*mountinfo.Info
	// Dev is field 3. It is 0:N for file systems without a block device of
	// their own, btrfs among them.
	Dev host.DevNum
	// Table is the file it was read from.
	Table string
}

// readOnly reports whether this mount, not its file system, refuses writes
// (field 6).
func (m mount) readOnly() bool { return hasOption(m.Options, "ro") }

// hasOption looks for a whole word among comma-separated mount options.
func hasOption(options, word string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == word {
			return true
		}
	}
	return false
}

// mountTable is what PID 1 sees mounted and, where it lives in a mount namespace
// of its own, what the kubelet sees besides. Only what [mountFilter] keeps is in
// it.
type mountTable struct {
	Mounts []mount
	// Top is the index of the uppermost mount at a mount point.
	Top map[string]int
	// Kubelet is the one that runs here; nil when none does.
	Kubelet *Kubelet
	// Version is another one whenever a table has changed.
	Version [2]int
	// Partial: a table could not be read, or a line of one, so that what is not
	// here may be mounted all the same.
	Partial bool
}

// own is the name of PID 1's mount table: the one whose paths the host's tree has.
const ownMountTable = "/proc/1/mountinfo"

// mountFilter says which lines of a mount table are wanted. Of the thousands
// on a busy node most are overlays and tmpfs of containers.
type mountFilter struct {
	// Points are mount points of which every mount is wanted, whatever it is.
	Points map[string]bool
}

func (f mountFilter) wants(dev host.DevNum, point, fsType []byte) bool {
	return dev.Major != 0 || f.Points[string(point)] || isNetworkFS(string(fsType)) ||
		string(fsType) == "btrfs" || string(fsType) == "devtmpfs" || isCSIMount(point)
}

// isCSIMount finds the mounts of CSI volumes, whatever they are of: that a volume
// is mounted must be known also of a driver that mounts a tmpfs.
func isCSIMount(point []byte) bool {
	return bytes.HasSuffix(point, []byte("/globalmount")) ||
		bytes.HasSuffix(point, []byte("/mount")) && bytes.Contains(point, []byte("/volumes/kubernetes.io~csi/"))
}

// isNetworkFS reports whether a file system is served by another machine or by
// a user process: such a mount can cease to answer while nothing here is broken.
func isNetworkFS(fsType string) bool {
	switch fsType {
	case "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "glusterfs", "lustre", "beegfs", "gpfs", "afs":
		return true
	}
	return strings.HasPrefix(fsType, "fuse.") || fsType == "fuse"
}

// readMounts reads the mount tables. Without the right to read PID 1's it takes
// this process's own, which is the same one for a program started by hand, and
// says so in the error.
func readMounts(ctx context.Context, in Input, filter mountFilter) (mountTable, error) {
	// Before 5.8 a mount that came or went during the reading could make the
	// kernel leave another one out.
	o, err := in.Host.OS(ctx)
	torn := err == nil && kernelBefore(o.Kernel, 5, 8)

	var t mountTable
	var errs []error
	mounts, err := readMountTable(ctx, in, ownMountTable, torn, filter)
	name := ownMountTable
	if errors.Is(err, fs.ErrPermission) {
		errs = append(errs, fmt.Errorf("mounts: %w; judged by the mounts this process sees", err))
		name = "/proc/self/mountinfo"
		mounts, err = readMountTable(ctx, in, name, torn, filter)
	}
	var bad badLines
	switch {
	case errors.As(err, &bad):
		errs = append(errs, fmt.Errorf("mounts: %s: %w", name, err))
	case err != nil:
		return mountTable{Partial: true}, errors.Join(append(errs, fmt.Errorf("mounts: %w", err))...)
	}
	t.add(mounts, ownMountTable)

	kubelet, ok, err := findKubelet(ctx, in)
	if err != nil {
		errs = append(errs, err)
	}
	if ok {
		t.Kubelet = &kubelet
	}
	if ok && kubelet.OwnMounts {
		mounts, err := readMountTable(ctx, in, kubelet.MountInfo(), torn, filter)
		t.add(mounts, kubelet.MountInfo())
		if err != nil && !isGone(err) { // gone: it has just been restarted
			errs = append(errs, fmt.Errorf("mounts of the kubelet: %w", err))
		}
		t.Partial = err != nil
	}
	t.Partial = t.Partial || len(errs) > 0
	for i, key := range []string{keptOwnMounts, keptKubeletMounts} {
		kept, _ := Kept[keptMounts](in.Memory, key)
		t.Version[i] = kept.version
	}
	return t, errors.Join(errs...)
}

// add appends what is not there yet: a namespace begins as a copy of its
// parent's mounts.
func (t *mountTable) add(mounts []*mountinfo.Info, table string) {
	type key struct {
		dev         host.DevNum
		root, point string
	}
	var known map[key]bool
	if len(t.Mounts) > 0 {
		known = make(map[key]bool, len(t.Mounts))
		for _, m := range t.Mounts {
			known[key{m.Dev, m.Root, m.Mountpoint}] = true
		}
	}
	if t.Top == nil {
		t.Top = make(map[string]int, len(mounts))
	}
	t.Mounts = slices.Grow(t.Mounts, len(mounts))
	for _, info := range mounts {
		m := mount{Info: info, Dev: host.DevNum{Major: uint32(info.Major), Minor: uint32(info.Minor)}, Table: table}
		if known[key{m.Dev, m.Root, m.Mountpoint}] {
			continue
		}
		t.Mounts = append(t.Mounts, m)
		if _, taken := t.Top[m.Mountpoint]; !taken || known == nil {
			t.Top[m.Mountpoint] = len(t.Mounts) - 1
		}
	}
}

// at returns what is mounted at a path, the uppermost if there are several.
func (t mountTable) at(point string) (mount, bool) {
	i, ok := t.Top[point]
	if !ok {
		return mount{}, false
	}
	return t.Mounts[i], true
}

// keptMounts is what was parsed of a mount table, and its fingerprint.
type keptMounts struct {
	seed   maphash.Seed
	sum    uint64
	length int
	filter mountFilter
	mounts []*mountinfo.Info
	// version counts the changes.
	version int
}

// The names of what is kept of mount tables.
const (
	keptOwnMounts     = "mounts"
	keptKubeletMounts = "mounts of the kubelet"
)

// readMountTable reads until two readings agree where the kernel needs it, and
// parses a table that is not, byte by byte, the one that was parsed last. There is
// no shorter sign: the kernel tells of mounts that come and go (poll(2)), but not
// when it makes a file system read-only.
func readMountTable(ctx context.Context, in Input, name string, torn bool, filter mountFilter) ([]*mountinfo.Info, error) {
	key := keptKubeletMounts // whose PID changes
	if name == ownMountTable {
		key = keptOwnMounts
	}
	old, ok := Kept[keptMounts](in.Memory, key)
	if !ok {
		old.seed = maphash.MakeSeed()
	}
	var now *mountScan
	for n := range 6 {
		next := newMountScan(filter)
		next.sum.SetSeed(old.seed)
		if err := in.Host.ReadThrough(ctx, name, host.MaxMountTable, next.take); err != nil {
			return nil, err
		}
		same := n > 0 && next.same(now.sum.Sum64(), now.length)
		if now = next; !torn || same {
			break
		}
	}
	if ok && now.same(old.sum, old.length) && maps.Equal(old.filter.Points, filter.Points) {
		return old.mounts, nil
	}
	mounts, err := now.mounts()
	if err == nil {
		in.Memory.Keep(key, keptMounts{old.seed, now.sum.Sum64(), now.length, filter, mounts, old.version + 1})
	}
	return mounts, err
}

// kernelBefore compares the first two numbers of a kernel release.
func kernelBefore(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

// parseMounts parses the lines of proc_pid_mountinfo(5) that the filter wants.
// Lines that are no mounts, the last one of a table that was cut off among
// them, are left out and told in the error, as badLines.
func parseMounts(data []byte, filter mountFilter) ([]*mountinfo.Info, error) {
	s := newMountScan(filter)
	s.take(data)
	return s.mounts()
}

// badLines tells of lines that are no mounts, the others were parsed; or that
// there is none at all.
type badLines struct {
	count   int
	example string
}

func (b badLines) Error() string {
	if b.count == 0 {
		return "empty"
	}
	return fmt.Sprintf("%s no mount or cut off: %q", countOf(b.count, "line is", "lines are"), b.example)
}

// mountScan takes a mount table piece by piece and keeps the lines that are
// wanted. It looks at the bytes before the library parses: a line can be longer
// than the library's scanner accepts (an overlay of hundreds of layers), and one
// bad line would cost it all others.
type mountScan struct {
	filter mountFilter
	// sum and length are the fingerprint of all that was taken.
	sum    maphash.Hash
	length int
	lines  host.Lines
	kept   []byte
	bad    badLines
}

func newMountScan(filter mountFilter) *mountScan {
	s := &mountScan{filter: filter}
	s.lines.Each = s.line
	return s
}

func (s *mountScan) same(sum uint64, length int) bool {
	return s.length == length && s.sum.Sum64() == sum
}

func (s *mountScan) take(piece []byte) {
	s.sum.Write(piece)
	s.length += len(piece)
	s.lines.Take(piece)
}

func (s *mountScan) line(line []byte) {
	dev, point, fsType, ok := scanMountLine(line)
	switch {
	case !ok:
		s.reject(line)
	case s.filter.wants(dev, point, fsType):
		s.kept = append(s.kept, line...)
	}
}

func (s *mountScan) reject(line []byte) {
	if s.bad.count++; s.bad.count == 1 {
		s.bad.example = shown(string(line[:min(len(line), 60)]))
	}
}

// mounts parses what was kept.
func (s *mountScan) mounts() ([]*mountinfo.Info, error) {
	if s.length == 0 {
		return nil, s.bad
	}
	if rest := s.lines.Rest(); len(rest) > 0 {
		s.reject(rest)
	}
	mounts, err := mountinfo.GetMountsFromReader(bytes.NewReader(s.kept), nil)
	if err != nil {
		mounts = mounts[:0]
		for line := range bytes.Lines(s.kept) {
			one, err := mountinfo.GetMountsFromReader(bytes.NewReader(line), nil)
			if err != nil {
				s.reject(line)
				continue
			}
			mounts = append(mounts, one...)
		}
	}
	if s.bad.count > 0 {
		return mounts, s.bad
	}
	return mounts, nil
}

// scanMountLine finds the fields the filter needs without allocating. ok is
// false for a line that is no mount or lacks its end.
func scanMountLine(line []byte) (dev host.DevNum, point, fsType []byte, ok bool) {
	body, whole := bytes.CutSuffix(line, []byte("\n"))
	if !whole || bytes.IndexByte(body, 0) >= 0 {
		return dev, nil, nil, false
	}
	rest := body
	var field [6][]byte // id, parent, maj:min, root, mount point, options
	for i := range field {
		field[i], rest, ok = bytes.Cut(rest, []byte(" "))
		if !ok || len(field[i]) == 0 {
			return dev, nil, nil, false
		}
	}
	// The separator as the library finds it: the last one with three fields
	// behind it. Were the first one taken, a line with two would be judged by
	// one file system type and kept with another.
	tail := body[len(body)-len(rest)-1:]
	end := len(tail)
	for range 3 {
		if end = bytes.LastIndexByte(tail[:end], ' '); end < 0 {
			return dev, nil, nil, false
		}
	}
	sep := bytes.LastIndex(tail[:end+1], []byte(" - "))
	if sep < 0 {
		return dev, nil, nil, false
	}
	fsType, _, _ = bytes.Cut(tail[sep+len(" - "):], []byte(" "))
	major, minor, ok := bytes.Cut(field[2], []byte(":"))
	if !ok {
		return dev, nil, nil, false
	}
	a, errA := strconv.ParseUint(string(major), 10, 32)
	b, errB := strconv.ParseUint(string(minor), 10, 32)
	if errA != nil || errB != nil {
		return dev, nil, nil, false
	}
	return host.DevNum{Major: uint32(a), Minor: uint32(b)}, field[4], fsType, true
}

// declaredMount is a mount that fstab or a unit file describes.
type declaredMount struct {
	// Spec is the device as written: a path, or TAG=value.
	Spec string
	// Point is the mount point; "none" or "swap" for swap areas.
	Point   string
	Type    string
	Options string
	// Source is "/etc/fstab line 3" or the unit file's path.
	Source string
}

// isDevice reports whether Spec names a block device.
func (d declaredMount) isDevice() bool {
	if hasOption(d.Options, "bind") || hasOption(d.Options, "rbind") || hasOption(d.Options, "loop") || isNetworkFS(d.Type) {
		return false
	}
	// /dev/root is no device since udev, and bcachefs lists its devices there.
	if d.Spec == "/dev/root" || d.Type == "bcachefs" {
		return false
	}
	return strings.HasPrefix(d.Spec, "/dev/") || d.link() != d.Spec
}

// link is the path under which udev keeps the device of a TAG=value
// (60-persistent-storage.rules); any other Spec is returned as it is.
func (d declaredMount) link() string {
	tag, value, ok := strings.Cut(d.Spec, "=")
	if !ok || value == "" {
		return d.Spec
	}
	dir := map[string]string{"UUID": "by-uuid", "LABEL": "by-label", "PARTUUID": "by-partuuid", "PARTLABEL": "by-partlabel", "ID": "by-id"}[tag]
	if dir == "" || strings.HasPrefix(tag, "PART") && strings.Contains(value, "/") { // PARTUUID=.../PARTNROFF=1 is the kernel's
		return d.Spec
	}
	return "/dev/disk/" + dir + "/" + udevEncode(strings.Trim(value, `"'`))
}

// udevEncode writes a label as udev does in the name of a link: every byte that
// is neither a plain character nor part of valid UTF-8 becomes \xNN (systemd
// src/basic/device-nodes.c).
func udevEncode(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case n > 1 && r != utf8.RuneError,
			'0' <= r && r <= '9', 'A' <= r && r <= 'Z', 'a' <= r && r <= 'z', n == 1 && strings.IndexByte("#+-.:=@_", s[i]) >= 0:
			b.WriteString(s[i : i+n])
		default:
			for _, c := range []byte(s[i : i+n]) {
				fmt.Fprintf(&b, `\x%02x`, c)
			}
		}
		i += n
	}
	return b.String()
}

// maxFstab is far more than a person or an installer writes, in bytes.
const maxFstab = 1 << 20

// declaredMounts reads /etc/fstab and the mount units in files. The units that
// systemd makes by itself from the mount table are left alone: they repeat it,
// and there are as many as mounts.
//
// A unit file counts for systemd once it has read it, at a boot or when told to. That
// is seen at once, and so is a name that comes or goes where an administrator's units
// are.
func declaredMounts(ctx context.Context, in Input) ([]declaredMount, error) {
	var all []declaredMount
	var errs []error
	data, err := in.Host.ReadFileMax(ctx, "/etc/fstab", maxFstab)
	switch {
	case err == nil:
		all = parseFstab(data)
	case !errors.Is(err, fs.ErrNotExist):
		errs = append(errs, err)
	}
	var sign [len(mountUnitSigns)]fileID
	for i, dir := range mountUnitSigns {
		if sign[i], err = statID(ctx, in.Host, dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	units, err := remembered(in, "mount units", sign, func() ([]declaredMount, error) { return mountUnits(ctx, in.Host) })
	return slices.Concat(all, units), errors.Join(append(errs, err)...)
}

// mountUnitDirs are in the order of precedence of systemd.unit(5), those of the
// administrator and of this boot first; /run/systemd/generator repeats fstab.
var mountUnitDirs = []string{"/etc/systemd/system", "/run/systemd/transient", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// mountUnitSigns are those of the administrator and of this boot, and the folder that
// systemd makes anew whenever it reads its units (lookup_paths_flush_generator in its
// path-lookup.c).
var mountUnitSigns = [4]string{"/etc/systemd/system", "/run/systemd/transient", "/run/systemd/system", "/run/systemd/generator"}

func mountUnits(ctx context.Context, files host.Files) ([]declaredMount, error) {
	var all []declaredMount
	var errs []error
	seen := map[string]bool{}
	for _, dir := range mountUnitDirs {
		names, err := files.ReadDir(ctx, dir)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		for _, name := range names {
			if path.Ext(name) != ".mount" || seen[name] {
				continue
			}
			seen[name] = true
			full := path.Join(dir, name)
			data, err := files.ReadFileMax(ctx, full, maxFstab)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, host.ErrNotRegular) { // masked, or gone meanwhile
				continue
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
			d, ok, err := parseMountUnit(data)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", full, err))
			}
			if ok {
				d.Source = full
				all = append(all, d)
			}
		}
	}
	return all, errors.Join(errs...)
}

// parseFstab parses fstab(5). Lines with fewer than two fields are skipped, as
// mount(8) does.
func parseFstab(data []byte) []declaredMount {
	var all []declaredMount
	n := 0
	for line := range bytes.Lines(data) {
		n++
		f := strings.FieldsFunc(string(line), func(r rune) bool { return r == ' ' || r == '\t' || r == '\n' || r == '\r' })
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		for i := range f {
			f[i] = unescapeFstab(f[i])
		}
		f = append(f, "", "")
		d := declaredMount{Spec: f[0], Point: f[1], Type: f[2], Options: f[3], Source: "/etc/fstab line " + strconv.Itoa(n)}
		if path.IsAbs(d.Point) {
			d.Point = path.Clean(d.Point)
		}
		all = append(all, d)
	}
	return all
}

// unescapeFstab undoes the \040 of getmntent(3).
func unescapeFstab(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseMountUnit parses systemd.mount(5). ok is false without a What= and an
// absolute Where=, and when either holds a specifier, whose value the file does
// not tell.
func parseMountUnit(data []byte) (d declaredMount, ok bool, err error) {
	opts, err := unit.DeserializeOptions(bytes.NewReader(data))
	if err != nil {
		return declaredMount{}, false, fmt.Errorf("not a unit file: %w", err)
	}
	for _, o := range opts {
		if o.Section != "Mount" {
			continue
		}
		switch o.Name { // a later line replaces an earlier one
		case "What":
			d.Spec = o.Value
		case "Where":
			d.Point = o.Value
		case "Type":
			d.Type = o.Value
		case "Options":
			d.Options = o.Value
		}
	}
	if d.Spec == "" || !path.IsAbs(d.Point) || strings.Contains(d.Spec+d.Point, "%") {
		return declaredMount{}, false, nil
	}
	d.Point = path.Clean(d.Point)
	return d, true, nil
}

// volume is a mount the kubelet or a CSI driver made, told by its path.
type volume struct {
	// Dir is the directory beside which vol_data.json may lie.
	Dir string
	// Plugin is what follows kubernetes.io~, "csi" for a global mount.
	Plugin string
	// Name is the PersistentVolume, or the pod's own name of the volume.
	Name string
	// Pod is the pod's UID; empty for a global mount.
	Pod string
	// Global: where a CSI driver stages the volume, before any pod has it.
	Global bool
}

// volumeAt takes a mount point of the kubelet's apart. It goes by the layout
// below the kubelet's root directory (kubernetes pkg/volume/csi), not by where
// that directory is.
func volumeAt(point string) (volume, bool) {
	const staged = "/plugins/kubernetes.io/csi/"
	if i := strings.Index(point, staged); i >= 0 {
		// ".../csi/globalmount", which any user of FUSE can mount, is not one.
		if folder, ok := strings.CutSuffix(point[i+len(staged):], "/globalmount"); ok && folder != "" {
			v := volume{Dir: point[:i+len(staged)+len(folder)], Plugin: "csi", Global: true}
			// Kubernetes before 1.24: .../csi/pv/NAME/globalmount.
			if name, ok := strings.CutPrefix(folder, "pv/"); ok && !strings.Contains(name, "/") {
				v.Name = name
			}
			return v, true
		}
	}
	for _, kind := range []string{"/volumes/kubernetes.io~", "/volume-subpaths/"} {
		i := strings.Index(point, kind)
		if i < 0 {
			continue
		}
		pods, uid := path.Split(point[:i])
		if path.Base(pods) != "pods" || uid == "" {
			continue
		}
		rest := point[i+len(kind):]
		v := volume{Pod: uid}
		if kind == "/volume-subpaths/" {
			v.Name, _, _ = strings.Cut(rest, "/")
			return v, v.Name != ""
		}
		var ok bool
		if v.Plugin, rest, ok = strings.Cut(rest, "/"); !ok {
			continue
		}
		v.Name, _, _ = strings.Cut(rest, "/")
		v.Dir = point[:i] + kind + v.Plugin + "/" + v.Name
		return v, v.Name != ""
	}
	return volume{}, false
}

// rawVolume names the PersistentVolume of a raw block mount
// (kubernetes pkg/volume/csi/csi_block.go); "" for any other path.
func rawVolume(point string) string {
	_, rest, ok := strings.Cut(point, "/kubernetes.io/csi/volumeDevices/")
	if !ok {
		return ""
	}
	kind, rest, _ := strings.Cut(rest, "/")
	if kind != "staging" && kind != "publish" {
		return kind // volumeDevices/NAME/dev/POD
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

// volumeData is the kubelet's vol_data.json beside a CSI volume's mount
// (kubernetes pkg/volume/csi/csi_plugin.go).
type volumeData struct {
	// PV is the PersistentVolume; only beside a pod's mount.
	PV     string `json:"specVolID"`
	Handle string `json:"volumeHandle"`
	Driver string `json:"driverName"`
	// Lifecycle is "Persistent", or "Ephemeral" for a volume that is part of
	// its pod and has no PersistentVolume.
	Lifecycle string `json:"volumeLifecycleMode"`
}

// maxVolumeData is the limit of vol_data.json, in bytes; real ones have some
// hundred.
const maxVolumeData = 64 << 10

func readVolumeData(ctx context.Context, files host.Files, v volume) (volumeData, error) {
	if v.Plugin != "csi" {
		return volumeData{}, fs.ErrNotExist
	}
	data, err := files.ReadFileMax(ctx, v.Dir+"/vol_data.json", maxVolumeData)
	if err != nil {
		return volumeData{}, err
	}
	return parseVolumeData(data)
}

func parseVolumeData(data []byte) (volumeData, error) {
	var d volumeData
	if err := json.Unmarshal(data, &d); err != nil {
		return volumeData{}, errors.New("vol_data.json: not what the kubelet writes")
	}
	return d, nil
}

// shown makes a string from the host fit to stand in a sentence: what is not
// printable text is shown quoted, and what is absurdly long is cut.
func shown(s string) string {
	const most = 256
	if len(s) > most {
		cut := most
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "…"
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// countOf is "1 disk", "2 disks".
func countOf(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}
