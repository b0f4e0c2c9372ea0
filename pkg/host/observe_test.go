package host

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An agent that only observes puts nothing on the host, not even for a moment: no
// command with its control group, no client socket, no repair.
func TestObserveLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"sys/fs/cgroup", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	server, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "run/s")})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	h, err := Open(Options{Root: dir, Observe: true, init: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()

	marker := filepath.Join(dir, "ran")
	if _, err := h.Run(t.Context(), shell("touch "+marker, 5*time.Second)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a command: %v", err)
	}
	if c, err := h.Dial(t.Context(), "unixgram", "/run/s"); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a client socket: %v, %v", c, err)
	}
	if _, err := OpenForChange(Options{Root: dir, Observe: true, init: os.Getpid()}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a Changer: %v", err)
	}
	var left []string
	for _, d := range []string{".", "run", "sys/fs/cgroup"} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !e.IsDir() {
				left = append(left, e.Name())
			}
		}
	}
	if len(left) != 1 || left[0] != "s" {
		t.Errorf("the tree holds %q, want only the server's socket", left)
	}
}
