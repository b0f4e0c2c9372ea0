package host

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestConfined: nothing leaves the tree, whatever the links in it say, by either
// way of resolving.
func TestConfined(t *testing.T) {
	outside := t.TempDir()
	writeTree(t, outside, map[string]string{"secret": "outside\n"})
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{
		"run/lock/x":  "inside\n",
		"etc/passwd":  "host\n",
		"etc/deep/ok": "deep\n",
	})
	for link, target := range map[string]string{
		"var":          "/run",              // absolute, as /var/run is
		"etc/up":       "../../../../etc",   // climbs above the root
		"etc/out":      outside + "/secret", // names a path outside
		"etc/loop":     "loop",
		"etc/dangling": "/nowhere",
		"etc/self":     "/proc/self/root",
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, legacy := range []bool{false, true} {
		r, err := OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		r.legacy = legacy
		ctx := within(t, 10*time.Second)
		for _, tt := range []struct {
			name, want string
			err        error
		}{
			{name: "/var/lock/x", want: "inside\n"},
			{name: "var/lock/x", want: "inside\n"},
			{name: "/etc/up/passwd", want: "host\n"},
			{name: "/../../etc/passwd", want: "host\n"},
			{name: "/etc/deep/../passwd", want: "host\n"},
			{name: "/etc/out", err: fs.ErrNotExist},
			{name: "/etc/loop", err: unix.ELOOP},
			{name: "/etc/dangling", err: fs.ErrNotExist},
			{name: "/etc/self/etc/passwd", err: fs.ErrNotExist},
			{name: "/etc/passwd/x", err: unix.ENOTDIR},
			{name: "/etc", err: ErrNotRegular},
			{name: "/etc/pass\x00wd", err: unix.EINVAL},
			{name: "/" + strings.Repeat("x", 300), err: unix.ENAMETOOLONG},
		} {
			data, err := r.ReadFile(ctx, tt.name)
			if string(data) != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("legacy %v: ReadFile(%q) = %q, %v; want %q, %v", legacy, tt.name, data, err, tt.want, tt.err)
			}
		}
		for name, want := range map[string]string{
			"/var/lock/../lock/x": "/run/lock/x",
			"/":                   "/",
			"/..":                 "/",
			"/etc/up/deep":        "/etc/deep",
		} {
			if got, err := r.RealPath(ctx, name); got != want || err != nil {
				t.Errorf("legacy %v: RealPath(%s) = %q, %v; want %q", legacy, name, got, err, want)
			}
			if got, err := r.walk(name); got != want || err != nil {
				t.Errorf("legacy %v: walk(%s) = %q, %v; want %q", legacy, name, got, err, want)
			}
		}
		if _, err := r.RealPath(ctx, "/etc/dangling"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("RealPath of a dangling link: %v", err)
		}
		if got, err := r.ReadLink(ctx, "/etc/out"); got != outside+"/secret" || err != nil {
			t.Errorf("ReadLink = %q, %v", got, err)
		}
		if _, err := r.ReadLink(ctx, "/etc/passwd"); !errors.Is(err, unix.EINVAL) {
			t.Errorf("ReadLink of a file: %v", err)
		}
		if st, err := r.Lstat(ctx, "/etc/out"); err != nil || st.Mode.Type() != fs.ModeSymlink {
			t.Errorf("Lstat = %+v, %v", st, err)
		}
		names, err := r.ReadDir(ctx, "/var")
		if strings.Join(names, " ") != "lock" || err != nil {
			t.Errorf("ReadDir = %v, %v", names, err)
		}
		if _, err := r.ReadDir(ctx, "/etc/passwd"); !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("ReadDir of a file: %v", err)
		}
	}
}

// TestMagicLinks: the links of /proc/PID lead anywhere, but not through us.
func TestMagicLinks(t *testing.T) {
	r, err := OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx := within(t, 10*time.Second)
	for _, name := range []string{"/proc/self/exe", "/proc/self/root/etc/passwd", "/proc/self/cwd/root.go"} {
		if data, err := r.ReadFile(ctx, name); err == nil {
			t.Errorf("ReadFile(%s) gave %d bytes", name, len(data))
		}
	}
	if target, err := r.ReadLink(ctx, "/proc/self/exe"); err != nil || !filepath.IsAbs(target) {
		t.Errorf("ReadLink(/proc/self/exe) = %q, %v", target, err)
	}
}

// TestSpecialFiles: what is not a file is neither read nor waited for.
func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx := within(t, 10*time.Second)
	if _, err := r.ReadFile(ctx, "/fifo"); !errors.Is(err, ErrNotRegular) {
		t.Errorf("fifo: %v", err)
	}
	if _, err := r.ReadFile(ctx, "/socket"); !errors.Is(err, unix.ENXIO) {
		t.Errorf("socket: %v", err)
	}
	system, err := OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer system.Close()
	if _, err := system.ReadFile(ctx, "/dev/zero"); !errors.Is(err, ErrNotRegular) {
		t.Errorf("device: %v", err)
	}
	if st, err := system.Stat(ctx, "/dev/zero"); err != nil || st.Rdev != (DevNum{1, 5}) || st.Mode&fs.ModeCharDevice == 0 {
		t.Errorf("Stat(/dev/zero) = %+v, %v", st, err)
	}
}

func TestSizes(t *testing.T) {
	dir := t.TempDir()
	big := strings.Repeat("0123456789abcdef", 64<<10) // 1 MiB: more than a worker keeps
	writeTree(t, dir, map[string]string{"empty": "", "small": "x", "page": big[:4096], "scratch": big[:scratchSize], "over": big[:scratchSize+1], "big": big})
	// A hole costs nothing on disk and would be 1 TiB in memory.
	if err := os.Truncate(filepath.Join(dir, "empty"), 0); err != nil {
		t.Fatal(err)
	}
	writeTree(t, dir, map[string]string{"hole": ""})
	if err := os.Truncate(filepath.Join(dir, "hole"), 1<<40); err != nil {
		t.Fatal(err)
	}
	r, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx := context.Background()
	var kept [][]byte
	for name, want := range map[string]string{"empty": "", "small": "x", "page": big[:4096], "scratch": big[:scratchSize], "over": big[:scratchSize+1], "big": big} {
		data, err := r.ReadFile(ctx, name)
		if string(data) != want || err != nil {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(data), err, len(want))
		}
		kept = append(kept, data)
	}
	// What was handed out must not be read into again.
	sums := make([]string, len(kept))
	for i := range kept {
		sums[i] = string(kept[i])
	}
	for range 20 {
		r.ReadFile(ctx, "big")
		r.ReadFile(ctx, "scratch")
	}
	for i := range kept {
		if string(kept[i]) != sums[i] {
			t.Fatal("a later read changed an earlier answer")
		}
	}
	if _, err := r.ReadFile(ctx, "hole"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("hole: %v", err)
	}
	if _, err := r.ReadFileMax(ctx, "page", 4095); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one byte too many: %v", err)
	}
	if data, err := r.ReadFileMax(ctx, "page", 4096); len(data) != 4096 || err != nil {
		t.Errorf("exactly the limit: %d, %v", len(data), err)
	}
	// /proc files have no size before they are read.
	system, err := OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer system.Close()
	if _, err := system.ReadFileMax(ctx, "/proc/self/status", 100); !errors.Is(err, ErrTooLarge) {
		t.Errorf("/proc file beyond the limit: %v", err)
	}
	if data, err := system.ReadFile(ctx, "/proc/self/status"); !strings.HasPrefix(string(data), "Name:") || err != nil {
		t.Errorf("/proc file: %q, %v", data, err)
	}
}
