package probes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// isExt reports whether the ext4 driver may serve the file system.
func isExt(fsType string) bool { return fsType == "ext4" || fsType == "ext3" || fsType == "ext2" }

// isWritableFS leaves out what is read-only by nature (squashfs, erofs, iso9660).
func isWritableFS(fsType string) bool {
	return isExt(fsType) || slices.Contains([]string{"xfs", "btrfs", "f2fs", "bcachefs", "jfs", "nilfs2", "ocfs2", "gfs2", "vfat", "exfat", "ntfs3"}, fsType)
}

// checkFilesystem looks for a file system that refuses writes after an error.
// How the kernel shows that has changed and differs by file system: ext4 set the
// super block's "ro" once, shows nothing at all in 6.12, and the word
// "emergency_ro" from about 6.15; btrfs sets "ro"; XFS shows nothing but
// answers EIO, see checkAnswers.
func (p *diskPass) checkFilesystem(ctx context.Context, d *mountedDevice) {
	if d.Gone {
		return
	}
	super := d.superOptions()
	for _, word := range []string{"emergency_ro", "shutdown"} {
		if hasOption(super, word) {
			p.refusesWrites(ctx, d, "", finding.Evidence{Source: d.Mounts[0].Table, Observed: "file system options " + shown(super), Expected: "no " + word})
			return
		}
	}
	var damage ext4Damage
	if isExt(d.fsType()) && d.Name.Name != "" {
		damage = p.ext4Damage(ctx, d)
	}
	switch {
	case damage.refuses:
		p.refusesWrites(ctx, d, damage.firstSeen(), damage.evidence...)
	case hasOption(super, "ro") && isWritableFS(d.fsType()):
		p.checkReadOnly(ctx, d, damage)
	case len(damage.evidence) > 0:
		subject, label, evidence := p.describe(ctx, d)
		p.tell(finding.Finding{
			Reason: "FilesystemErrors", Severity: finding.Warning, Subject: subject,
			Message:  fmt.Sprintf("%s has found errors in itself since it was mounted and goes on writing%s", label, damage.firstSeen()),
			Evidence: append(damage.evidence, evidence...),
		})
	}
}

func (p *diskPass) refusesWrites(ctx context.Context, d *mountedDevice, since string, why ...finding.Evidence) {
	subject, label, evidence := p.describe(ctx, d)
	p.tell(finding.Finding{
		Reason: "FilesystemReadOnly", Severity: finding.Critical, Subject: subject,
		Message:  fmt.Sprintf("%s refuses writes after an error%s", label, since),
		Evidence: append(slices.Clone(why), evidence...),
	})
}

// checkReadOnly tells a file system the kernel made read-only from one that was
// mounted so. mount(8) sets both the mount and the file system read-only, the
// kernel only the latter; and fstab or a unit may say that writing was meant.
func (p *diskPass) checkReadOnly(ctx context.Context, d *mountedDevice, damage ext4Damage) {
	forced := len(damage.evidence) > 0
	why := damage.evidence
	if !slices.ContainsFunc(d.Mounts, mount.readOnly) {
		forced = true
		why = append(why, finding.Evidence{Source: d.Mounts[0].Table, Observed: "mounted read-write, file system read-only: " + mountLine(d.Mounts[0]), Expected: "rw in both"})
	}
	for _, n := range p.declared {
		if !n.isDevice() || hasOption(n.Options, "ro") || hasOption(n.Options, "noauto") {
			continue
		}
		m, ok := p.mounts.at(n.Point)
		if ok && slices.ContainsFunc(d.Mounts, func(o mount) bool { return o.Info == m.Info }) {
			forced = true
			why = append(why, finding.Evidence{Source: n.Source, Observed: shown(n.Point) + " is to be mounted read-write", Expected: "rw, where " + m.Table + " has ro"})
		}
	}
	if !forced {
		return
	}
	subject, label, evidence := p.describe(ctx, d)
	message := fmt.Sprintf("%s has become read-only", label)
	if log := p.kernelLog(ctx)[d.Name.Name]; log.refused != "" {
		message = fmt.Sprintf("%s was made read-only by the kernel after an error", label)
		why = append(why, finding.Evidence{Source: "kernel log", Observed: shown(log.refused)})
	}
	p.tell(finding.Finding{Reason: "FilesystemReadOnly", Severity: finding.Critical, Subject: subject, Message: message, Evidence: append(why, evidence...)})
}

// ext4Damage is what an ext4 has met since it was mounted.
type ext4Damage struct {
	// evidence is empty when there is nothing, or nothing of this mount.
	evidence []finding.Evidence
	refuses  bool
	last     time.Time
}

func (d ext4Damage) firstSeen() string {
	if d.last.IsZero() {
		return ""
	}
	return ", the last at " + d.last.UTC().Format(time.RFC3339)
}

// ext4Damage judges the errors ext4 counts in its super block. The count
// outlives mounts and boots until fsck clears it, so only an error later than
// this mount counts; whether writing has ended stands in the kernel log, and
// where that has been overwritten, follows from the mount options.
func (p *diskPass) ext4Damage(ctx context.Context, d *mountedDevice) ext4Damage {
	name := d.Name.Name
	e, err := p.readExt4Errors(ctx, name)
	if err != nil {
		p.fail(err)
		return ext4Damage{}
	}
	if e.Count == 0 {
		return ext4Damage{}
	}
	o, err := p.Host.OS(ctx)
	if err != nil {
		p.fail(fmt.Errorf("errors of %s: when this boot began: %w", name, err))
	} else if e.Last.Before(o.BootTime.Add(-time.Second)) {
		return ext4Damage{}
	}
	since, known := p.ext4MountedSince(ctx, name, o.BootTime)
	// The super block keeps whole seconds.
	if known && e.Last.Add(time.Second).Before(since) {
		return ext4Damage{}
	}
	log, logged := p.kernelLog(ctx)[name]
	if !known && logged && log.mounted && log.lastError == "" && log.refused == "" {
		return ext4Damage{} // the kernel log saw it mounted and nothing since
	}
	damage := ext4Damage{last: e.Last, evidence: []finding.Evidence{{
		Source: "/sys/fs/ext4/" + name, Observed: fmt.Sprintf("errors_count %d, last_error_time %d, last_error_func %s", e.Count, e.Last.Unix(), shown(e.LastFunc)), Expected: "errors_count 0",
	}}}
	switch {
	case log.refused != "":
		damage.refuses = true
		damage.evidence = append(damage.evidence, finding.Evidence{Source: "kernel log", Observed: shown(log.refused)})
	case e.LastFunc == "ext4_journal_check_start":
		// "Detected aborted journal": every write after an abort ends there.
		damage.refuses = true
	case hasOption(d.superOptions(), "errors=remount-ro"):
		damage.refuses = true
		damage.evidence = append(damage.evidence, finding.Evidence{Source: d.Mounts[0].Table, Observed: "errors=remount-ro"})
	}
	return damage
}

// ext4Errors are the error records of an ext4 super block, /sys/fs/ext4/DEV
// (Documentation/ABI/testing/sysfs-fs-ext4). Times are whole seconds.
type ext4Errors struct {
	Count    uint64
	Last     time.Time
	LastFunc string
}

func (p *diskPass) readExt4Errors(ctx context.Context, name string) (ext4Errors, error) {
	dir := "/sys/fs/ext4/" + name + "/"
	// One attribute of a healthy file system, not three.
	count, err := p.tree.attribute(ctx, dir+"errors_count")
	if err != nil || count == "" || count == "0" {
		return ext4Errors{}, err
	}
	last, err := p.tree.attribute(ctx, dir+"last_error_time")
	if err != nil {
		return ext4Errors{}, err
	}
	fn, err := p.tree.attribute(ctx, dir+"last_error_func")
	if err != nil {
		return ext4Errors{}, err
	}
	e, err := parseExt4Errors(count, last, fn)
	if err != nil {
		return ext4Errors{}, fmt.Errorf("%s: %w", dir, err)
	}
	return e, nil
}

func parseExt4Errors(count, last, fn string) (ext4Errors, error) {
	e := ext4Errors{LastFunc: strings.TrimSpace(fn)}
	var err error
	if e.Count, err = strconv.ParseUint(strings.TrimSpace(count), 10, 64); err != nil {
		return ext4Errors{}, fmt.Errorf("errors_count: %q is no number", shown(count))
	}
	if last = strings.TrimSpace(last); last == "" { // kernels that keep no time
		return e, nil
	}
	seconds, err := strconv.ParseInt(last, 10, 64)
	if err != nil || seconds < 0 || seconds > 1<<40 {
		return ext4Errors{}, fmt.Errorf("last_error_time: %q is no time", shown(last))
	}
	e.Last = time.Unix(seconds, 0)
	return e, nil
}

// ext4MountedSince takes the start of the journal's kernel thread for the time
// of the mount, which nothing else tells.
func (p *diskPass) ext4MountedSince(ctx context.Context, name string, boot time.Time) (time.Time, bool) {
	text, err := p.tree.attribute(ctx, "/sys/fs/ext4/"+name+"/journal_task")
	pid, bad := strconv.Atoi(strings.TrimSpace(text))
	if err != nil || bad != nil || boot.IsZero() {
		return time.Time{}, false
	}
	procs, err := p.Host.Processes(ctx)
	if err != nil {
		p.fail(fmt.Errorf("process table: %w", err))
		return time.Time{}, false
	}
	i := slices.IndexFunc(procs, func(q host.Process) bool { return q.PID == pid && q.Kernel && strings.HasPrefix(q.Comm, "jbd2/") })
	if i < 0 {
		return time.Time{}, false
	}
	return boot.Add(time.Duration(procs[i].StartTicks) * (time.Second / userHZ)), true
}

// filesystemEvents are what the kernel log says of each device's file system
// since it was last mounted.
type filesystemEvents map[string]filesystemEvent

type filesystemEvent struct {
	// mounted: the log reaches back to the mount.
	mounted bool
	// lastError and refused are the last line of either kind, empty if none.
	lastError, refused string
}

// kernelLog reads the kernel's ring buffer, once and only when something else
// already looks wrong: it can hold megabytes.
func (p *diskPass) kernelLog(ctx context.Context) filesystemEvents {
	if p.events == nil {
		records, err := p.Host.KernelLog(ctx)
		if err != nil {
			p.fail(fmt.Errorf("kernel log: %w", err))
		}
		events := parseFilesystemEvents(records)
		p.events = &events
	}
	return *p.events
}

// parseFilesystemEvents reads the messages of fs/ext4/super.c, fs/jbd2/journal.c,
// fs/xfs/xfs_fsops.c and fs/btrfs/messages.c. They are facts of the log, not of
// the present: a device may have been unmounted and its name given to another.
func parseFilesystemEvents(records []host.KernelRecord) filesystemEvents {
	events := filesystemEvents{}
	for _, r := range records {
		device, kind := filesystemEventOf(r.Text)
		if device == "" || kind == noEvent {
			continue
		}
		e := events[device]
		switch kind {
		case mountEvent:
			e = filesystemEvent{mounted: true}
		case errorEvent:
			e.lastError = r.Text
		case refusalEvent:
			e.refused = r.Text
		}
		events[device] = e
	}
	return events
}

type eventKind int

const (
	noEvent eventKind = iota
	mountEvent
	errorEvent
	refusalEvent
)

// maxComm is the most bytes a process's name has, less its NUL (TASK_COMM_LEN).
const maxComm = 15

// filesystemEventOf takes a line of the log apart. Some lines begin with the name
// of a process, 15 bytes of its own choice, and end with that of a file of its:
// "XFS (sda1): [77]: segfault at 0 ... in FILE" (show_signal_msg of
// arch/x86/mm/fault.c). They are known by the bracket, and what stands around
// the device is looked at to the byte besides.
func filesystemEventOf(text string) (device string, kind eventKind) {
	if strings.IndexByte(text[:min(len(text), maxComm+1)], '[') >= 0 {
		return "", noEvent
	}
	inParens := func(s string) (in, rest string) {
		in, rest, _ = strings.Cut(s, ")")
		in = strings.TrimPrefix(in, "device ")
		message, ok := strings.CutPrefix(rest, ": ")
		if !ok && !strings.HasPrefix(rest, " in ") {
			return "", ""
		}
		return in, message
	}
	switch {
	case strings.HasPrefix(text, "EXT4-fs error ("):
		device, _ = inParens(text[len("EXT4-fs error ("):])
		return device, errorEvent
	case strings.HasPrefix(text, "EXT4-fs ("):
		device, rest := inParens(text[len("EXT4-fs ("):])
		switch {
		case strings.HasPrefix(rest, "Remounting filesystem read-only"), strings.HasPrefix(rest, "shut down requested"):
			return device, refusalEvent
		case strings.HasPrefix(rest, "mounted filesystem"), strings.HasPrefix(rest, "unmounting filesystem"),
			strings.HasPrefix(rest, "re-mounted") && strings.Contains(rest, " r/w"):
			return device, mountEvent
		}
	case strings.HasPrefix(text, "Aborting journal on device "):
		// "dm-1-8.": the device, and the journal's inode where it is inside.
		device = strings.TrimSuffix(text[len("Aborting journal on device "):], ".")
		if i := strings.LastIndexByte(device, '-'); i > 0 {
			device = device[:i]
		}
		return device, refusalEvent
	case strings.HasPrefix(text, "XFS ("):
		device, rest := inParens(text[len("XFS ("):])
		switch {
		case strings.Contains(rest, "has been shut down"), strings.Contains(rest, "hutting down filesystem"), strings.Contains(rest, "shutdown received"):
			return device, refusalEvent
		case strings.HasPrefix(rest, "Mounting V"), strings.HasPrefix(rest, "Unmounting Filesystem"):
			return device, mountEvent
		case strings.Contains(rest, "orruption"), strings.Contains(rest, "I/O error"), strings.Contains(rest, "I/O Error"):
			return device, errorEvent
		}
	case strings.HasPrefix(text, "BTRFS"):
		head, rest, ok := strings.Cut(text, "(device ")
		if !ok || strings.Trim(head, "BTRFS: acefgilnorstw") != "" { // "BTRFS: error ", "BTRFS critical "
			return "", noEvent
		}
		device, rest = inParens(rest)
		device, _, _ = strings.Cut(device, " ") // "sda1 state EA"
		switch {
		case strings.Contains(rest, "forced readonly"):
			return device, refusalEvent
		case strings.HasPrefix(rest, "first mount of filesystem"):
			return device, mountEvent
		case strings.HasPrefix(text, "BTRFS error"), strings.HasPrefix(text, "BTRFS critical"), strings.HasPrefix(text, "BTRFS: error"):
			return device, errorEvent
		}
	}
	return "", noEvent
}

// askable is a file system whose mount point is asked whether it answers.
type askable struct {
	ask mount
	all *mountedDevice
}

// checkAnswers asks the mounts that may hang, or that show their state in no
// other way, and returns how many: network mounts, volumes of the kubelet, and
// XFS, which after a shutdown answers EIO while every table calls it healthy.
// Each file system is asked at one of its mount points.
func (p *diskPass) checkAnswers(ctx context.Context) int {
	var list []askable
	for _, d := range p.mounted {
		if d.Gone {
			continue
		}
		_, _, isVolume := volumeOf(d.Mounts)
		if d.fsType() != "xfs" && !isVolume {
			continue
		}
		if m, ok := p.askableMount(d.Mounts); ok {
			list = append(list, askable{m, d})
		} else if d.fsType() == "xfs" {
			p.checkUnreachableXFS(ctx, d)
		}
	}
	remote := map[host.DevNum]*mountedDevice{}
	var order []*mountedDevice
	for _, m := range p.mounts.Mounts {
		if !isNetworkFS(m.FSType) {
			continue
		}
		d := remote[m.Dev]
		if d == nil {
			d = &mountedDevice{Dev: m.Dev}
			remote[m.Dev] = d
			order = append(order, d)
		}
		d.Mounts = append(d.Mounts, m)
	}
	for _, d := range order {
		if m, ok := p.askableMount(d.Mounts); ok {
			list = append(list, askable{m, d})
		}
	}

	answers := p.askAll(ctx, list)
	denied, notLive := 0, false
	for i, a := range answers {
		switch {
		case a.err == nil, errors.Is(a.err, fs.ErrNotExist):
		case errors.Is(a.err, host.ErrNotLive):
			notLive = true
		case errors.Is(a.err, fs.ErrPermission):
			// A user's FUSE mount is closed to everybody else, root included.
			if !strings.HasPrefix(list[i].ask.FSType, "fuse") {
				denied++
			}
		case ctx.Err() != nil: // this pass has run out of time, which says nothing about the mount
			p.fail(fmt.Errorf("%s: %w", shown(list[i].ask.Mountpoint), a.err))
		case list[i].ask.FSType == "xfs" && errors.Is(a.err, syscall.EIO):
			why := []finding.Evidence{{Source: "stat " + shown(list[i].ask.Mountpoint), Observed: "input/output error", Expected: "an answer; XFS that has shut down gives none"}}
			if log := p.kernelLog(ctx)[list[i].all.Name.Name]; log.refused != "" {
				why = append(why, finding.Evidence{Source: "kernel log", Observed: shown(log.refused)})
			}
			p.refusesWrites(ctx, list[i].all, ": XFS has shut down", why...)
		default:
			p.unresponsive(ctx, list[i], a)
		}
	}
	if notLive {
		p.fail(fmt.Errorf("%s: whether they answer: %w", countOf(len(list), "mount that may hang", "mounts that may hang"), host.ErrNotLive))
	}
	if denied > 0 {
		p.fail(fmt.Errorf("%s could not be asked whether they answer: %w", countOf(denied, "mount", "mounts"), fs.ErrPermission))
	}
	return len(list)
}

// askableMount picks the mount to ask: one in PID 1's table, for its paths are
// those of the host's tree, and not hidden below another.
func (p *diskPass) askableMount(mounts []mount) (mount, bool) {
	open := slices.DeleteFunc(slices.Clone(mounts), func(m mount) bool {
		top, ok := p.mounts.at(m.Mountpoint)
		return m.Table != ownMountTable || !ok || top.Info != m.Info
	})
	if len(open) == 0 {
		return mount{}, false
	}
	return mainMount(open), true
}

// checkUnreachableXFS judges an XFS that only the kubelet's mount namespace has
// by the kernel log.
func (p *diskPass) checkUnreachableXFS(ctx context.Context, d *mountedDevice) {
	if log := p.kernelLog(ctx)[d.Name.Name]; log.refused != "" {
		p.refusesWrites(ctx, d, ": XFS has shut down", finding.Evidence{Source: "kernel log", Observed: shown(log.refused)})
	}
}

type answer struct {
	host.MountStat
	err error
}

// askAll asks many mounts at a time: a dead server with a hundred mounts must
// not cost a hundred timeouts in a row. What still hangs from an earlier pass
// is not asked again and answers at once.
func (p *diskPass) askAll(ctx context.Context, list []askable) []answer {
	answers := make([]answer, len(list))
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(len(list), 32) {
		wg.Go(func() {
			for i := range next {
				st, err := p.Host.StatMount(ctx, list[i].ask.Mountpoint)
				answers[i] = answer{st, err}
			}
		})
	}
	for i := range list {
		next <- i
	}
	close(next)
	wg.Wait()
	return answers
}

// unresponsive tells a mount that does not answer or answers only errors
// (ESTALE, ENOTCONN of a FUSE daemon that died, ...).
func (p *diskPass) unresponsive(ctx context.Context, t askable, a answer) {
	subject, label, evidence := p.describe(ctx, t.all)
	f := finding.Finding{Reason: "MountUnresponsive", Severity: finding.Warning, Subject: subject}
	_, v, isVolume := volumeOf(t.all.Mounts)
	source := "stat " + shown(t.ask.Mountpoint)
	if !errors.Is(a.err, host.ErrNoReply) {
		var errno syscall.Errno
		said := a.err.Error()
		if errors.As(a.err, &errno) {
			said = errno.Error()
		}
		f.Message = fmt.Sprintf("%s can not be used: it answers %q", label, said)
		f.Evidence = []finding.Evidence{{Source: source, Observed: said, Expected: "an answer"}}
		if isVolume && v.Pod != "" {
			f.Severity = finding.Critical
		}
	} else {
		f.Message = label + " does not answer"
		observed := "no answer in time"
		if !a.Pending.IsZero() {
			observed = "no answer since " + a.Pending.UTC().Format(time.RFC3339)
		}
		f.Evidence = []finding.Evidence{{Source: source, Observed: observed, Expected: "an answer"}}
		if stuck := p.waitingFor(ctx, t.ask.FSType); len(stuck) > 0 {
			f.Severity = finding.Critical
			f.Message += fmt.Sprintf(", and %s waiting on it or its like without being killable", countOf(len(stuck), "process is", "processes are"))
			f.Evidence = append(f.Evidence, finding.Evidence{Source: "/proc/PID/wchan", Observed: strings.Join(stuck[:min(len(stuck), 5)], ", ")})
		}
	}
	f.Evidence = append(f.Evidence, finding.Evidence{Source: t.ask.Table, Observed: mountLine(t.ask)})
	f.Evidence = append(f.Evidence, evidence...)
	p.tell(f)
}

// waitingFor lists processes in uninterruptible sleep in a kernel function of
// this kind of file system. Which mount of the kind they wait for the kernel
// does not tell.
func (p *diskPass) waitingFor(ctx context.Context, fsType string) []string {
	procs, err := p.Host.ProcessesNow(ctx)
	if err != nil {
		p.fail(fmt.Errorf("process table: %w", err))
		return nil
	}
	var stuck []string
	for _, q := range procs {
		if q.State != 'D' || q.Kernel {
			continue
		}
		data, err := p.Host.ReadFileMax(ctx, procFile(q.PID, "wchan"), maxAttribute)
		if err != nil {
			p.fail(unlessGone(err))
			continue
		}
		if fn := strings.TrimSpace(string(data)); waitsIn(fn, fsType) {
			stuck = append(stuck, fmt.Sprintf("%s (PID %d) in %s", shown(q.Comm), q.PID, shown(fn)))
		}
	}
	return stuck
}

func waitsIn(fn, fsType string) bool {
	var prefixes []string
	switch {
	case fsType == "nfs" || fsType == "nfs4":
		prefixes = []string{"rpc_", "nfs", "__rpc"}
	case fsType == "cifs" || fsType == "smb3":
		prefixes = []string{"cifs", "smb", "wait_for_response", "compound_send_recv"}
	case fsType == "ceph":
		prefixes = []string{"ceph"}
	case strings.HasPrefix(fsType, "fuse"), fsType == "virtiofs", fsType == "glusterfs":
		prefixes = []string{"fuse", "request_wait_answer", "__fuse"}
	case !isNetworkFS(fsType):
		prefixes = []string{"submit_bio_wait", "io_schedule", "blk_", "jbd2", "xfs", "ext4", "btrfs"}
	}
	// Any file system that caches pages waits for them here.
	prefixes = append(prefixes, "folio_wait_bit", "wait_on_page_bit", "wait_on_bit")
	return slices.ContainsFunc(prefixes, func(s string) bool { return strings.HasPrefix(fn, s) })
}
