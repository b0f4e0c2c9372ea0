package probes

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/tools/txtar"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// hostileCases are hosts on which a probe reads everything it ever does, more or
// less.
var hostileCases = map[string][]string{
	"time":      {"chrony-synchronised", "hypervisor-disagrees"},
	"disks":     {"thin-pools", "csi-volume-hangs", "required-link-lost", "md-degraded", "volumes-left-folders", "flexvolume-left"},
	"multipath": {"two-paths", "longhorn-claimed"},
	"iscsi":     {"multipath-well", "automatic-login", "module-required-loaded"},
	"pids":      {"healthy", "inotify-near-limit"},
	"oom":       {"healthy", "container-oom"},
	"packages":  {"debian-healthy", "status-d", "rhel-lock"},
	"units":     {"file-differs"},
	"kernel":    {"sysctl-differs", "module-loaded-by-service"},
}

func probeByName(t *testing.T, name string, h *hosttest.Host) Probe {
	t.Helper()
	all := Defaults()
	if text, ok := h.Section("config"); ok {
		var settings any
		if err := yaml.Unmarshal([]byte(text), &settings); err != nil {
			t.Fatal(err)
		}
		data, err := yaml.Marshal(map[string]any{name: settings})
		if err == nil {
			err = yaml.UnmarshalStrict(data, &all)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range all.List() {
		if p.Name() == name {
			return p
		}
	}
	t.Fatalf("no probe %s", name)
	return nil
}

// lenient is a test that hosttest asks unlisted questions of: a probe that finds
// other files asks other questions.
type lenient struct{ testing.TB }

func (lenient) Errorf(string, ...any) {}

// canary is a file outside of every tree that nobody must open, in every form a
// probe might take for its own.
const canaryText = "canary-of-the-outside"

// substitute is what an attacker puts in the place of a file.
type substitute struct {
	name string
	// put makes it at a path that does not exist.
	put func(at string) error
}

func substitutes(t *testing.T, canary string) []substitute {
	t.Helper()
	list := []substitute{
		{"absolute link out", func(at string) error { return os.Symlink(canary, at) }},
		{"dots out", func(at string) error { return os.Symlink(strings.Repeat("../", 40)+canary[1:], at) }},
		{"link to the directory outside", func(at string) error { return os.Symlink(strings.Repeat("../", 40)+filepath.Dir(canary)[1:], at) }},
		{"magic link out", func(at string) error { return os.Symlink("/proc/self/root"+canary, at) }},
		{"dangling link", func(at string) error { return os.Symlink("nowhere", at) }},
		{"loop", func(at string) error { return os.Symlink(filepath.Base(at), at) }},
		{"fifo", func(at string) error { return syscall.Mkfifo(at, 0o666) }},
		{"socket", func(at string) error { return syscall.Mknod(at, syscall.S_IFSOCK|0o666, 0) }},
		{"directory", func(at string) error { return os.MkdirAll(at+"/\x1b[2J\n/deep", 0o755) }},
		{"10 GB of nothing", func(at string) error { return sparse(at, 10<<30) }},
		// Below the limit of every reader but the largest, all of one line.
		{"15 MB of nothing", func(at string) error { return sparse(at, 15<<20) }},
		{"garbage", func(at string) error { return os.WriteFile(at, []byte(garbage()), 0o644) }},
		{"every byte, often", func(at string) error {
			return os.WriteFile(at, []byte(strings.Repeat(garbage()+"\n: = (,) -9223372036854775808 18446744073709551616 0x 1e999 NaN\n", 200)), 0o644)
		}},
		{"what nobody may read", func(at string) error { return os.WriteFile(at, []byte(canaryText), 0) }}, // by others than root
		{"empty", func(at string) error { return os.WriteFile(at, nil, 0o644) }},
		{"no newline", func(at string) error { return os.WriteFile(at, []byte("18446744073709551615"), 0o644) }},
	}
	if os.Getuid() == 0 {
		device := func(major, minor int) func(string) error {
			return func(at string) error { return syscall.Mknod(at, syscall.S_IFCHR|0o666, major<<8|minor) }
		}
		list = append(list, substitute{"/dev/zero", device(1, 5)}, substitute{"/dev/full", device(1, 7)}, substitute{"/dev/tty", device(5, 0)})
	}
	return list
}

func sparse(at string, size int64) error {
	if err := os.WriteFile(at, nil, 0o644); err != nil {
		return err
	}
	return os.Truncate(at, size)
}

func garbage() string {
	var b strings.Builder
	for c := range 256 {
		b.WriteByte(byte(c))
	}
	return b.String() + "\x1b]0;owned\a\u202e\u009b"
}

// watched tells whether anybody has opened the canary since it was asked last.
type watched struct{ fd int }

func watch(t *testing.T, name string) watched {
	t.Helper()
	fd, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	for _, n := range []string{name, filepath.Dir(name)} {
		if _, err := syscall.InotifyAddWatch(fd, n, syscall.IN_OPEN|syscall.IN_ACCESS|syscall.IN_MODIFY|syscall.IN_CREATE|syscall.IN_DELETE|syscall.IN_ATTRIB); err != nil {
			t.Fatal(err)
		}
	}
	return watched{fd}
}

func (w watched) touched() bool {
	n, err := syscall.Read(w.fd, make([]byte, 4096))
	return err == nil && n > 0
}

// hostileMemory is what a pass may take whatever stands in the place of one file,
// in bytes allocated altogether; what is held at a time is less.
const hostileMemory = 96 << 20

// TestHostileFiles puts in the place of each file a probe looks at, one after the
// other, what an attacker or a broken disk might: links out of the root, FIFOs,
// devices, a file of 10 GB, garbage. The pass ends, does not panic, takes a
// bounded amount of memory, opens nothing outside, and says what it found in
// findings its rules declare. HYGIENE_NIGHTLY=1 tries everything everywhere.
func TestHostileFiles(t *testing.T) {
	outside, aside := t.TempDir(), filepath.Join(t.TempDir(), "aside")
	canary := filepath.Join(outside, "canary")
	if err := os.WriteFile(canary, []byte(canaryText+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	guard := watch(t, canary)
	if f, err := os.Open(canary); err != nil || !guard.touched() {
		t.Fatalf("the canary does not sing: %v", err)
	} else {
		f.Close()
		guard.touched()
	}
	everything := os.Getenv("HYGIENE_NIGHTLY") != ""
	passes, most := 0, uint64(0)
	for probe, cases := range hostileCases {
		for _, name := range cases {
			ar, err := txtar.ParseFile(filepath.Join("testdata", probe, name+".txtar"))
			if err != nil {
				t.Fatal(err)
			}
			h := hosttest.New(lenient{t}, ar)
			p, require := probeByName(t, probe, h), hostileRequire(t, h)
			r := hosttest.Note(h)
			check(t, p, r, require, h.Times()[0])
			names := map[string]bool{}
			for _, n := range r.Names() {
				names[n] = true
			}
			// What the host package reads by itself, and what the case has besides.
			err = filepath.WalkDir(h.Path("/"), func(at string, e fs.DirEntry, err error) error {
				if err == nil && !e.IsDir() {
					names[filepath.Clean(strings.TrimPrefix(at, strings.TrimSuffix(h.Path("/"), "/")))] = true
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			delete(names, "/")
			for _, at := range slices.Sorted(maps.Keys(names)) {
				for i, s := range substitutes(t, canary) {
					hash := fnv.New32()
					fmt.Fprint(hash, name, at, s.name)
					if !everything && hash.Sum32()%16 != 0 && i > 0 {
						continue
					}
					passes++
					what := fmt.Sprintf("%s/%s: %s in place of %s", probe, name, s.name, at)
					restore, err := replace(h, at, aside, s.put)
					if err != nil {
						if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
							continue // no mknod here, or below a file
						}
						t.Fatal(what, err)
					}
					var before, after runtime.MemStats
					runtime.ReadMemStats(&before)
					out := check(t, p, reopened(t, h), require, h.Times()[0])
					runtime.ReadMemStats(&after)
					took := after.TotalAlloc - before.TotalAlloc
					most = max(most, took)
					if took > hostileMemory {
						t.Errorf("%s: the pass took %d MiB", what, took>>20)
					}
					if strings.Contains(out, canaryText) && s.name != "what nobody may read" || guard.touched() {
						t.Errorf("%s: the outside was opened\n%s", what, out)
					}
					if strings.HasPrefix(out, "panic") {
						t.Errorf("%s: %s", what, out)
					}
					if err := restore(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	t.Logf("%d passes, at most %d MiB allocated in one", passes, most>>20)
}

// reopened opens the tree anew, so that nothing is remembered of it.
func reopened(t *testing.T, h *hosttest.Host) host.View {
	t.Helper()
	h.Tree.Close()
	tree, err := host.OpenTree(h.Path("/"))
	if err != nil {
		t.Fatal(err)
	}
	h.Tree = tree
	return h
}

func hostileRequire(t *testing.T, h *hosttest.Host) (r Require) {
	t.Helper()
	if text, ok := h.Section("require"); ok {
		if err := yaml.UnmarshalStrict([]byte(text), &r); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// check makes one pass and returns what came out.
func check(t *testing.T, p Probe, v host.View, require Require, now time.Time) (out string) {
	t.Helper()
	defer func() {
		if e := recover(); e != nil {
			out = fmt.Sprintf("panic: %v\n%s", e, debug.Stack())
		}
	}()
	in := Input{Host: v, Memory: NewMemory(), Require: require, Now: now}
	in.Memory.Begin()
	result, err := p.Check(context.Background(), in)
	checkHostileRules(t, p, result)
	return render(result, err)
}

// checkHostileRules: what is found is declared, whatever it was found in.
func checkHostileRules(t *testing.T, p Probe, r finding.Result) {
	t.Helper()
	declared := map[string]bool{}
	for _, rule := range p.Rules() {
		declared[rule.Reason] = true
	}
	for _, f := range r.Findings {
		if !declared[f.Reason] || f.Message == "" {
			t.Errorf("%+v", f)
		}
	}
}

// replace puts something else where a file, link or directory is, or nothing was.
// The case's own absolute links lead to places on this machine for everybody but
// the root's own functions.
func replace(h *hosttest.Host, name, aside string, put func(string) error) (restore func() error, err error) {
	dir, missing := filepath.Dir(name), ""
	real, err := h.RealPath(context.Background(), dir)
	for errors.Is(err, fs.ErrNotExist) && dir != "/" {
		dir, missing = filepath.Dir(dir), filepath.Base(dir)+"/"+missing
		real, err = h.RealPath(context.Background(), dir)
	}
	if err != nil {
		return nil, err
	}
	at := filepath.Join(h.Path(real), missing, filepath.Base(name))
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return nil, err
	}
	err = os.Rename(at, aside)
	was := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	restore = func() error {
		err := os.RemoveAll(at)
		if was {
			err = errors.Join(err, os.Rename(aside, at))
		}
		return err
	}
	if err := put(at); err != nil {
		return nil, errors.Join(err, restore())
	}
	return restore, nil
}
