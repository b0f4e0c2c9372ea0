// Package hosttest gives tests a host made from one readable text file (txtar).
// The tree is real, and read by the same code as a real host's; what needs a
// running kernel or daemon is scripted. Whatever the file does not list, and a
// probe asks for all the same, fails the test.
//
// Sections, all optional:
//
//	tree/etc/fstab      a file; a last line "\ No newline at end of file" drops
//	                    the newline before it; "\xNN" escapes only in treebin/
//	treebin/proc/7/comm a file whose text is a Go-quoted string body
//	links               "/var/run -> /run", one a line
//	dirs                empty directories, one a line
//	attrs               "/etc/x mode=0600 mtime=2026-01-02T03:04:05Z uid=0 gid=0"
//	nodes               "/dev/sda b 8:0": device nodes, as stat(2) shows them
//	procs               "PID COMM [ppid=1] [state=S] [threads=1] [start=100] [kthread]": writes /proc/PID/{stat,comm}
//	systemd             the SystemState, or "none"
//	units               "chrony.service load=loaded active=active sub=running mainpid=7 ..."; a line "*" answers not-found for the rest
//	bus/DEST PATH IFACE properties as JSON, or "absent"
//	socket/udp/127.0.0.1:323 and the like: a dialogue, see socket.go
//	adjtimex            "state=0 status=0x2001 offset=0s maxerror=1ms esterror=1ms"
//	ptp/dev/ptp0        "offset=1ms uncertainty=1us" or "denied"
//	dm                  "device NAME UUID 253:0 [suspended] [ro] [open=1] [event=3]", then "table START LEN TYPE ..." and "status ..." lines
//	statmount           "/data dev=8:1 [ro]", "/nfs hangs=2026-01-02T03:04:05Z" or "/x error=EIO"
//	locks               "/var/lib/dpkg/lock pid=12", or "free", "absent", "denied", "notlive" in place of pid=12
//	kmsg                records as /dev/kmsg gives them
//	run/COMMAND LINE    "exit N", then standard output; before it "! " marks lines of standard error; or "denied"
//	kubelet/configz     the kubelet's answer, or "error TEXT"
//	os                  "id=debian version=13 class=mutable ...", overriding detection
//	now                 the time of the pass; further lines are further passes
//
// A section NAME@2 replaces NAME (or a tree file) before the second pass, a tree
// file whose text is "absent" is removed.
package hosttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host"
)

// Host is a scripted [host.View].
type Host struct {
	*host.Tree
	t        testing.TB
	dir      string
	sections map[string]string
	// All holds the archive's sections as they stand, for the caller's own
	// ones such as "config" and "want".
	archive *txtar.Archive
	nodes   map[string]node
	uids    map[string][2]uint32
}

type node struct {
	mode fs.FileMode
	rdev host.DevNum
}

var _ host.View = (*Host)(nil)

// Load makes a host from the text file at name.
func Load(t testing.TB, name string) *Host {
	t.Helper()
	ar, err := txtar.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return New(t, ar)
}

// Parse makes a host from the text of a file.
func Parse(t testing.TB, text string) *Host {
	t.Helper()
	return New(t, txtar.Parse([]byte(text)))
}

// New makes a host from an archive.
func New(t testing.TB, ar *txtar.Archive) *Host {
	t.Helper()
	h := &Host{t: t, dir: t.TempDir(), sections: map[string]string{}, archive: ar, nodes: map[string]node{}, uids: map[string][2]uint32{}}
	h.apply("")
	h.reopen()
	return h
}

// reopen drops what the tree has cached, the process table above all.
func (h *Host) reopen() {
	if h.Tree != nil {
		h.Tree.Close()
	}
	tree, err := host.OpenTree(h.dir)
	if err != nil {
		h.t.Fatal(err)
	}
	h.Tree = tree
	h.t.Cleanup(func() { tree.Close() })
}

// Pass switches to the sections of pass n (2, 3, ...).
func (h *Host) Pass(n int) {
	h.t.Helper()
	h.apply("@" + strconv.Itoa(n))
	h.reopen()
}

// Section returns a section's text, and whether the file has it.
func (h *Host) Section(name string) (string, bool) {
	s, ok := h.sections[name]
	return s, ok
}

// Times are the moments of the "now" section; one fixed moment without it.
func (h *Host) Times() []time.Time {
	h.t.Helper()
	text, ok := h.sections["now"]
	if !ok {
		return []time.Time{time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	}
	var times []time.Time
	for _, line := range lines(text) {
		at, err := time.Parse(time.RFC3339, line)
		if err != nil {
			h.t.Fatalf("now: %v", err)
		}
		times = append(times, at)
	}
	return times
}

// Path is where a host path lies on the machine that runs the test.
func (h *Host) Path(name string) string { return filepath.Join(h.dir, filepath.Clean("/"+name)) }

func (h *Host) apply(suffix string) {
	h.t.Helper()
	for _, f := range h.archive.Files {
		base, at, _ := strings.Cut(f.Name, "@")
		if _, err := strconv.Atoi(at); err != nil { // template units are "getty@.service"
			base, at = f.Name, ""
		}
		if at != strings.TrimPrefix(suffix, "@") {
			continue
		}
		h.sections[base] = string(f.Data)
		switch kind, name, _ := strings.Cut(base, "/"); kind {
		case "tree":
			h.file(name, f.Data)
		case "treebin":
			text := strings.ReplaceAll(strings.TrimSuffix(string(f.Data), "\n"), `"`, `\"`)
			s, err := strconv.Unquote(`"` + strings.ReplaceAll(text, "\n", `\n`) + `"`)
			if err != nil {
				h.t.Fatalf("%s: %v", f.Name, err)
			}
			h.write(name, []byte(s))
		case "links":
			for _, line := range lines(string(f.Data)) {
				from, to, ok := strings.Cut(line, " -> ")
				if !ok {
					h.t.Fatalf("links: %q", line)
				}
				p := h.Path(from)
				h.must(os.MkdirAll(filepath.Dir(p), 0o755))
				os.Remove(p)
				if to != "absent" {
					h.must(os.Symlink(to, p))
				}
			}
		case "dirs":
			for _, line := range lines(string(f.Data)) {
				h.must(os.MkdirAll(h.Path(line), 0o755))
			}
		case "nodes":
			clear(h.nodes)
			for _, line := range lines(string(f.Data)) {
				fields := strings.Fields(line)
				if len(fields) != 3 {
					h.t.Fatalf("nodes: %q", line)
				}
				mode := fs.ModeDevice | 0o660
				if fields[1] == "c" {
					mode |= fs.ModeCharDevice
				}
				if _, err := os.Lstat(h.Path(fields[0])); err != nil {
					h.write(fields[0], nil)
				}
				h.nodes[path.Clean(fields[0])] = node{mode, h.dev(fields[2])}
			}
		case "procs":
			for _, line := range lines(string(f.Data)) {
				h.proc(line)
			}
		}
	}
	if text, ok := h.sections["attrs"]; ok {
		for _, line := range lines(text) {
			h.attrs(line)
		}
	}
}

func (h *Host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *Host) file(name string, data []byte) {
	if string(data) == "absent\n" {
		h.must(os.RemoveAll(h.Path(name)))
		return
	}
	const noNewline = "\n\\ No newline at end of file\n"
	if text, ok := strings.CutSuffix(string(data), noNewline); ok {
		data = []byte(text)
	}
	h.write(name, data)
}

func (h *Host) write(name string, data []byte) {
	p := h.Path(name)
	h.must(os.MkdirAll(filepath.Dir(p), 0o755))
	h.must(os.WriteFile(p, data, 0o644))
}

func (h *Host) proc(line string) {
	fields := strings.Fields(line)
	if len(fields) < 2 {
		h.t.Fatalf("procs: %q", line)
	}
	v := map[string]string{"ppid": "1", "state": "S", "threads": "1", "start": "100"}
	flags := 0x400000
	for _, f := range fields[2:] {
		k, val, ok := strings.Cut(f, "=")
		if !ok && k == "kthread" {
			flags |= 0x200000
			continue
		}
		if _, known := v[k]; !known {
			h.t.Fatalf("procs: %q: unknown %q", line, f)
		}
		v[k] = val
	}
	stat := fmt.Sprintf("%s (%s) %s %s 1 1 0 -1 %d 0 0 0 0 0 0 0 0 20 0 %s 0 %s 0 0 0\n",
		fields[0], fields[1], v["state"], v["ppid"], flags, v["threads"], v["start"])
	h.write("/proc/"+fields[0]+"/stat", []byte(stat))
	h.write("/proc/"+fields[0]+"/comm", []byte(fields[1]+"\n"))
}

func (h *Host) attrs(line string) {
	fields := strings.Fields(line)
	for _, f := range fields[1:] {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "mode":
			m, err := strconv.ParseUint(v, 8, 32)
			h.must(err)
			h.must(os.Chmod(h.Path(fields[0]), fs.FileMode(m)))
		case "mtime":
			at, err := time.Parse(time.RFC3339, v)
			h.must(err)
			h.must(os.Chtimes(h.Path(fields[0]), at, at))
		case "uid", "gid":
			n, err := strconv.ParseUint(v, 10, 32)
			h.must(err)
			ids := h.uids[fields[0]]
			ids[map[string]int{"uid": 0, "gid": 1}[k]] = uint32(n)
			h.uids[fields[0]] = ids
		default:
			h.t.Fatalf("attrs: %q: unknown %q", line, k)
		}
	}
}

func (h *Host) dev(s string) host.DevNum {
	var d host.DevNum
	if n, err := fmt.Sscanf(s, "%d:%d", &d.Major, &d.Minor); err != nil || n != 2 {
		h.t.Fatalf("%q is no device number", s)
	}
	return d
}

// lines drops empty lines and comments.
func lines(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return out
}

// attributes splits "a=b c=d flag" behind a subject.
func attributes(fields []string) map[string]string {
	m := map[string]string{}
	for _, f := range fields {
		k, v, _ := strings.Cut(f, "=")
		m[k] = v
	}
	return m
}

func (h *Host) unlisted(what string) error {
	h.t.Helper()
	h.t.Errorf("the probe asked for %s, which the case does not list", what)
	return fmt.Errorf("hosttest: %s is not listed", what)
}

// Stat implements [host.Files]; device nodes are as the case lists them.
func (h *Host) Stat(ctx context.Context, name string) (host.FileInfo, error) {
	st, err := h.Tree.Stat(ctx, name)
	if err != nil {
		return st, err
	}
	real, err := h.Tree.RealPath(ctx, name)
	if err != nil {
		return st, err
	}
	return h.dress(real, st), nil
}

// Lstat implements [host.Files].
func (h *Host) Lstat(ctx context.Context, name string) (host.FileInfo, error) {
	st, err := h.Tree.Lstat(ctx, name)
	if err != nil {
		return st, err
	}
	return h.dress(path.Clean(name), st), nil
}

func (h *Host) dress(name string, st host.FileInfo) host.FileInfo {
	if n, ok := h.nodes[name]; ok {
		st.Mode, st.Rdev = n.mode, n.rdev
	}
	ids := h.uids[name]
	st.UID, st.GID = ids[0], ids[1]
	return st
}

// OS implements [host.View].
func (h *Host) OS(ctx context.Context) (host.OS, error) {
	text, ok := h.sections["os"]
	if !ok {
		return h.Tree.OS(ctx)
	}
	o := host.OS{ID: "debian", VersionID: "13", Class: host.Mutable, Kernel: "6.12.0", Init: "systemd", BootID: "b00b",
		BootTime: h.Times()[0].Add(-time.Hour)}
	for k, v := range attributes(strings.Fields(text)) {
		switch k {
		case "id":
			o.ID = v
		case "like":
			o.IDLike = strings.Split(v, ",")
		case "variant":
			o.VariantID = v
		case "version":
			o.VersionID = v
		case "class":
			o.Class = host.OSClass(v)
		case "why":
			o.Why = v
		case "kernel":
			o.Kernel = v
		case "init":
			o.Init = v
		case "boot":
			at, err := time.Parse(time.RFC3339, v)
			h.must(err)
			o.BootTime = at
		default:
			h.t.Fatalf("os: unknown %q", k)
		}
	}
	return o, nil
}

// SystemState implements [host.View]; "running" when the case lists units only.
func (h *Host) SystemState(context.Context) (string, error) {
	text, ok := h.sections["systemd"]
	switch {
	case !ok:
		return "running", nil
	case strings.TrimSpace(text) == "none":
		return "", host.ErrNoSystemd
	}
	return strings.TrimSpace(text), nil
}

// Units implements [host.View].
func (h *Host) Units(ctx context.Context, names ...string) ([]host.Unit, error) {
	h.t.Helper()
	if _, err := h.SystemState(ctx); err != nil {
		return nil, err
	}
	known, rest, err := h.units()
	if err != nil {
		return nil, err
	}
	out := make([]host.Unit, 0, len(names))
	for _, name := range names {
		i := slices.IndexFunc(known, func(u host.Unit) bool { return u.Name == name })
		switch {
		case i >= 0:
			out = append(out, known[i])
		case rest:
			out = append(out, host.Unit{Name: name, ID: name, Load: "not-found", Active: "inactive", Sub: "dead"})
		default:
			return nil, h.unlisted("unit " + name)
		}
	}
	return out, nil
}

// UnitsMatching implements [host.View].
func (h *Host) UnitsMatching(ctx context.Context, patterns ...string) ([]host.Unit, error) {
	h.t.Helper()
	if _, err := h.SystemState(ctx); err != nil {
		return nil, err
	}
	known, _, err := h.units()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(known, func(u host.Unit) bool {
		return !slices.ContainsFunc(patterns, func(p string) bool {
			ok, _ := path.Match(p, u.Name)
			return ok
		})
	}), nil
}

func (h *Host) units() (known []host.Unit, rest bool, err error) {
	h.t.Helper()
	text, ok := h.sections["units"]
	if !ok {
		return nil, false, h.unlisted("units")
	}
	if msg, bad := strings.CutPrefix(text, "error "); bad {
		return nil, false, errors.New(strings.TrimSpace(msg))
	}
	for _, line := range lines(text) {
		if line == "*" {
			rest = true
			continue
		}
		fields := strings.Fields(line)
		u := host.Unit{Name: fields[0], ID: fields[0], Load: "loaded", Active: "active", Sub: "running", FileState: "enabled", Result: "success"}
		for k, v := range attributes(fields[1:]) {
			switch k {
			case "id":
				u.ID = v
			case "load":
				u.Load = v
			case "active":
				u.Active = v
			case "sub":
				u.Sub = v
			case "file":
				u.FileState = v
			case "job":
				u.Job = v != "0" && v != "false"
			case "result":
				u.Result = v
			case "mainpid":
				u.MainPID, err = strconv.Atoi(v)
			case "oom":
				u.OOMScoreAdjust, err = strconv.Atoi(v)
			case "cgroup":
				u.ControlGroup = v
			case "restarts":
				u.NRestarts, err = strconv.Atoi(v)
			case "since":
				u.ActiveSince, err = time.Parse(time.RFC3339, v)
			case "inactivesince":
				u.InactiveSince, err = time.Parse(time.RFC3339, v)
			case "triggered":
				u.LastTrigger, err = time.Parse(time.RFC3339, v)
			case "fragment":
				u.FragmentPath = v
			case "what":
				u.What = v
			case "where":
				u.Where = v
			default:
				h.t.Fatalf("units: %q: unknown %q", line, k)
			}
			h.must(err)
		}
		known = append(known, u)
	}
	return known, rest, nil
}

// BusProperties implements [host.View].
func (h *Host) BusProperties(_ context.Context, dest, object, iface string) (map[string]any, bool, error) {
	h.t.Helper()
	name := "bus/" + dest + " " + object + " " + iface
	text, ok := h.sections[name]
	if !ok {
		return nil, false, h.unlisted(name)
	}
	if strings.TrimSpace(text) == "absent" {
		return nil, false, nil
	}
	var props map[string]any
	if err := json.Unmarshal([]byte(text), &props); err != nil {
		h.t.Fatalf("%s: %v", name, err)
	}
	return props, true, nil
}

// Dial implements [host.View].
func (h *Host) Dial(_ context.Context, network, address string) (net.Conn, error) {
	h.t.Helper()
	name := "socket/" + network + "/" + strings.TrimPrefix(address, "/")
	text, ok := h.sections[name]
	if !ok {
		return nil, h.unlisted(name)
	}
	switch strings.TrimSpace(text) {
	case "refused":
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	case "denied":
		return nil, &net.OpError{Op: "dial", Net: network, Err: fs.ErrPermission}
	case "absent":
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ENOENT)}
	case "busy":
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.EAGAIN)}
	}
	return newConn(h.t, name, strings.HasPrefix(network, "udp") || network == "unixgram", text), nil
}

// Adjtimex implements [host.View].
func (h *Host) Adjtimex(context.Context) (host.Timex, error) {
	h.t.Helper()
	text, ok := h.sections["adjtimex"]
	if !ok {
		return host.Timex{}, h.unlisted("adjtimex")
	}
	var tx host.Timex
	var err error
	for k, v := range attributes(strings.Fields(text)) {
		switch k {
		case "state":
			tx.State, err = strconv.Atoi(v)
		case "status":
			var n int64
			n, err = strconv.ParseInt(v, 0, 32)
			tx.Status = int32(n)
		case "offset":
			tx.Offset, err = time.ParseDuration(v)
		case "maxerror":
			tx.MaxError, err = time.ParseDuration(v)
		case "esterror":
			tx.EstError, err = time.ParseDuration(v)
		default:
			h.t.Fatalf("adjtimex: unknown %q", k)
		}
		h.must(err)
	}
	return tx, nil
}

// PTPOffset implements [host.View].
func (h *Host) PTPOffset(_ context.Context, node string) (time.Duration, time.Duration, error) {
	h.t.Helper()
	text, ok := h.sections["ptp"+node]
	if !ok {
		return 0, 0, h.unlisted("ptp" + node)
	}
	if strings.TrimSpace(text) == "denied" {
		return 0, 0, &fs.PathError{Op: "open", Path: node, Err: fs.ErrPermission}
	}
	a := attributes(strings.Fields(text))
	offset, err := time.ParseDuration(a["offset"])
	h.must(err)
	uncertainty, err := time.ParseDuration(a["uncertainty"])
	h.must(err)
	return offset, uncertainty, nil
}

// DeviceMapper implements [host.View].
func (h *Host) DeviceMapper(context.Context) ([]host.DMDevice, error) {
	h.t.Helper()
	text, ok := h.sections["dm"]
	if !ok {
		return nil, h.unlisted("dm")
	}
	if msg, bad := strings.CutPrefix(text, "error "); bad {
		return nil, errors.New(strings.TrimSpace(msg))
	}
	var devs []host.DMDevice
	for _, line := range lines(text) {
		fields := strings.SplitN(line, " ", 5)
		switch fields[0] {
		case "device":
			f := strings.Fields(line)
			d := host.DMDevice{Name: f[1], UUID: f[2], Dev: h.dev(f[3])}
			for k, v := range attributes(f[4:]) {
				switch k {
				case "suspended":
					d.Suspended = true
				case "ro":
					d.ReadOnly = true
				case "open":
					d.OpenCount, _ = strconv.Atoi(v)
				case "event":
					n, _ := strconv.ParseUint(v, 10, 32)
					d.EventNr = uint32(n)
				}
			}
			devs = append(devs, d)
		case "table":
			start, err := strconv.ParseUint(fields[1], 10, 64)
			h.must(err)
			length, err := strconv.ParseUint(fields[2], 10, 64)
			h.must(err)
			t := host.DMTarget{Start: start, Length: length, Type: fields[3]}
			if len(fields) > 4 {
				t.Table = fields[4]
			}
			last := &devs[len(devs)-1]
			last.Targets = append(last.Targets, t)
		case "status":
			last := &devs[len(devs)-1]
			i := slices.IndexFunc(last.Targets, func(t host.DMTarget) bool { return strconv.FormatUint(t.Start, 10) == fields[1] })
			if i < 0 {
				h.t.Fatalf("dm: %q has no table line", line)
			}
			if len(fields) > 4 {
				last.Targets[i].Status = fields[4]
			}
		default:
			h.t.Fatalf("dm: %q", line)
		}
	}
	return devs, nil
}

// StatMount implements [host.View].
func (h *Host) StatMount(_ context.Context, mountPoint string) (host.MountStat, error) {
	h.t.Helper()
	for _, line := range lines(h.sections["statmount"]) {
		fields := strings.Fields(line)
		if fields[0] != mountPoint && fields[0] != "*" {
			continue
		}
		a := attributes(fields[1:])
		if since, ok := a["hangs"]; ok {
			at, err := time.Parse(time.RFC3339, since)
			h.must(err)
			return host.MountStat{Pending: at}, host.ErrNoReply
		}
		if name, ok := a["error"]; ok {
			errno := map[string]syscall.Errno{"EIO": syscall.EIO, "ESTALE": syscall.ESTALE, "ENOTCONN": syscall.ENOTCONN, "EACCES": syscall.EACCES, "ENODEV": syscall.ENODEV, "ENOENT": syscall.ENOENT}[name]
			return host.MountStat{}, &fs.PathError{Op: "stat", Path: mountPoint, Err: errno}
		}
		st := host.MountStat{}
		if d, ok := a["dev"]; ok {
			st.Dev = h.dev(d)
		}
		_, st.ReadOnly = a["ro"]
		return st, nil
	}
	return host.MountStat{}, h.unlisted("statmount " + mountPoint)
}

// LockHolder implements [host.View].
func (h *Host) LockHolder(_ context.Context, name string) (host.Lock, error) {
	h.t.Helper()
	for _, line := range lines(h.sections["locks"]) {
		fields := strings.Fields(line)
		if fields[0] != name {
			continue
		}
		a := attributes(fields[1:])
		if _, ok := a["absent"]; ok {
			return host.Lock{}, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if _, ok := a["free"]; ok {
			return host.Lock{}, nil
		}
		if _, ok := a["denied"]; ok {
			return host.Lock{}, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
		}
		if _, ok := a["notlive"]; ok {
			return host.Lock{}, host.ErrNotLive
		}
		pid, err := strconv.Atoi(a["pid"])
		h.must(err)
		return host.Lock{Held: true, PID: pid}, nil
	}
	return host.Lock{}, h.unlisted("lock " + name)
}

// KernelLog implements [host.View].
func (h *Host) KernelLog(context.Context) ([]host.KernelRecord, error) {
	h.t.Helper()
	text, ok := h.sections["kmsg"]
	if !ok {
		return nil, h.unlisted("kmsg")
	}
	if msg, bad := strings.CutPrefix(text, "error "); bad {
		return nil, errors.New(strings.TrimSpace(msg))
	}
	var recs []host.KernelRecord
	for _, line := range lines(text) {
		r, err := host.ParseKernelRecord([]byte(line))
		h.must(err)
		if r.Facility == 0 { // as host.KernelLog
			recs = append(recs, r)
		}
	}
	return recs, nil
}

// Run implements [host.View].
func (h *Host) Run(_ context.Context, c host.Command) (host.Output, error) {
	h.t.Helper()
	text, ok := h.sections["run/"+c.String()]
	if !ok {
		return host.Output{}, h.unlisted("run/" + c.String())
	}
	first, rest, _ := bytes.Cut([]byte(text), []byte("\n"))
	if string(first) == "denied" {
		return host.Output{}, fmt.Errorf("%s: %w", c, fs.ErrPermission)
	}
	code, err := strconv.Atoi(strings.TrimPrefix(string(first), "exit "))
	if err != nil {
		h.t.Fatalf("run/%s: first line %q, want \"exit N\"", c, first)
	}
	var stderr []byte
	for bytes.HasPrefix(rest, []byte("! ")) {
		line, after, _ := bytes.Cut(rest, []byte("\n"))
		stderr, rest = append(append(stderr, line[2:]...), '\n'), after
	}
	return host.Output{Stdout: rest, Stderr: stderr, Code: code}, nil
}

// KubeletAPI implements [host.View]; without a section there is no cluster.
func (h *Host) KubeletAPI(_ context.Context, name string, read func(io.Reader) error) error {
	text, ok := h.sections["kubelet/"+strings.TrimPrefix(name, "/")]
	if !ok {
		return host.ErrNotConfigured
	}
	if msg, bad := strings.CutPrefix(text, "error "); bad {
		return errors.New(strings.TrimSpace(msg))
	}
	return read(strings.NewReader(text))
}
