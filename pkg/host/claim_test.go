package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestClaim(t *testing.T) {
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	ctx := t.Context()
	dir := t.TempDir()

	first, err := h.Claim(ctx, dir)
	if err != nil || first.Despite != "" {
		t.Fatalf("%+v, %v", first, err)
	}
	var held *ClaimedError
	if _, err := h.Claim(ctx, dir); !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Errorf("a second claim: %v, want one that names process %d", err, os.Getpid())
	}
	first.Close()
	again, err := h.Claim(ctx, dir)
	if err != nil {
		t.Fatalf("after it was given up: %v", err)
	}
	again.Close()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	if _, err := h.Claim(ctx, filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Claim(ctx, file); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
}

// A process that is killed leaves no claim behind, and one of which a thread
// still hangs in the kernel does not keep its successor waiting.
func TestClaimOfTheDead(t *testing.T) {
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	until := func(what string, ok func(*Claim, error) bool) {
		t.Helper()
		dir := t.TempDir()
		p := helper(t, what+" "+dir, nil)
		if what == "claim" {
			var held *ClaimedError
			if _, err := h.Claim(t.Context(), dir); !errors.As(err, &held) || held.PID != p.Pid {
				t.Errorf("while it lives: %v, want one that names process %d", err, p.Pid)
			}
			p.Kill()
		}
		// The kernel takes a moment to end it, and another to let go of its files;
		// nobody waits for how long.
		for {
			c, err := h.Claim(t.Context(), dir)
			if err == nil {
				done := ok(c, err)
				c.Close()
				if done {
					return
				}
			}
			if t.Context().Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	until("claim", func(c *Claim, err error) bool { return c.Despite == "" })
	until("remains", func(c *Claim, err error) bool { return strings.Contains(c.Despite, "has ended") && c.Orphaned != 0 })
}

// playClaim holds a claim; as remains its first thread ends, as that of a
// process that was killed does, and another does not.
func playClaim(dir string, remains bool) error {
	h, err := Open(Options{})
	if err != nil {
		return err
	}
	if _, err := h.Claim(context.Background(), dir); err != nil {
		return err
	}
	if !remains {
		return ready()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- ready()
	}()
	if unix.Gettid() != os.Getpid() {
		return errors.New("not the first thread")
	}
	unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	return <-done
}

// A lock takes the right to read a directory only: who is not root can hold one,
// and keeps no agent waiting.
func TestClaimOfAnother(t *testing.T) {
	needsRoot(t)
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	dir := t.TempDir()
	for parent := dir; parent != os.TempDir() && parent != "/"; parent = filepath.Dir(parent) {
		if err := os.Chmod(parent, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, how := range []string{"exclusive", "shared"} {
		p := helper(t, "squat "+how+" "+dir, nil)
		c, err := h.Claim(t.Context(), dir)
		if err != nil || !strings.Contains(c.Despite, fmt.Sprintf("process %d is of user 65534", p.Pid)) {
			t.Errorf("%s: %+v, %v", how, c, err)
		}
		if err == nil {
			c.Close()
		}
		p.Kill()
		p.Wait()
	}
}

// playSquatter holds a lock as nobody.
func playSquatter(how, dir string) error {
	if err := syscall.Setgid(65534); err != nil {
		return err
	}
	if err := syscall.Setuid(65534); err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	kind := unix.LOCK_EX
	if how == "shared" {
		kind = unix.LOCK_SH
	}
	if err := unix.Flock(int(f.Fd()), kind|unix.LOCK_NB); err != nil {
		return err
	}
	return ready()
}

func TestNoAgent(t *testing.T) {
	for status, want := range map[string]string{
		"Name:\tagent\nState:\tS (sleeping)\nUid:\t0\t0\t0\t0\n":        "",
		"Name:\tagent\nState:\tZ (zombie)\nUid:\t0\t0\t0\t0\n":          "process 7 has ended, but for a thread that hangs in the kernel",
		"Name:\tsu\nState:\tS (sleeping)\nUid:\t1000\t0\t0\t0\n":        "process 7 is of user 1000, not root's",
		"Name:\tUid:\\nUid:0\nState:\tS (sleeping)\nUid:\t5\t5\t5\t5\n": "process 7 is of user 5, not root's",
		"": "",
	} {
		if got, zombie := noAgent(7, []byte(status)); got != want || zombie != strings.Contains(want, "has ended") {
			t.Errorf("%q: %q, want %q", status, got, want)
		}
	}
}

func TestFlockHolders(t *testing.T) {
	locks := []byte(`1: POSIX  ADVISORY  WRITE 101 fe:01:77 0 EOF
2: FLOCK  ADVISORY  READ 102 fe:01:77 0 EOF
3: FLOCK  ADVISORY  WRITE 103 fe:01:177 0 EOF
4: FLOCK  ADVISORY  WRITE 104 fe:01:77 0 EOF
4: -> FLOCK  ADVISORY  WRITE 105 fe:01:77 0 EOF
5: OFDLCK ADVISORY  WRITE -1 fe:01:78 0 EOF
6: FLOCK
`)
	for inode, want := range map[uint64][]int{77: {102, 104}, 177: {103}, 78: nil, 7: nil} {
		if got := flockHolders(locks, inode); !slices.Equal(got, want) {
			t.Errorf("inode %d is held by %d, want %d", inode, got, want)
		}
	}
}

func FuzzFlockHolders(f *testing.F) {
	f.Add([]byte("4: FLOCK  ADVISORY  WRITE 104 fe:01:77 0 EOF\n"), uint64(77))
	f.Fuzz(func(t *testing.T, locks []byte, inode uint64) {
		held := slices.ContainsFunc(bytes.Fields(locks), func(f []byte) bool { return bytes.HasSuffix(f, fmt.Appendf(nil, ":%d", inode)) })
		for _, pid := range flockHolders(locks, inode) {
			if pid <= 0 || !held {
				t.Errorf("process %d of %q holds %d", pid, locks, inode)
			}
		}
	})
}
