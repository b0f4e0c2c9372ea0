package host

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func shell(script string, timeout time.Duration) Command {
	return Command{argv: []string{"/bin/sh", "-c", script}, timeout: timeout}
}

func TestRun(t *testing.T) {
	h := openDir(t, "/")
	ctx := context.Background()

	out, err := h.Run(ctx, shell("echo out; echo err >&2; exit 3", 5*time.Second))
	if err != nil || string(out.Stdout) != "out\n" || string(out.Stderr) != "err\n" || out.Code != 3 {
		t.Errorf("%+v, %v", out, err)
	}

	t.Setenv("LD_PRELOAD", "/tmp/evil.so")
	t.Setenv("KUBECONFIG", "/secret")
	out, err = h.Run(ctx, Command{argv: []string{"/usr/bin/env"}, timeout: 5 * time.Second})
	env := strings.Fields(string(out.Stdout))
	slices.Sort(env)
	if got := strings.Join(env, " "); got != "HOME=/root LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin" || err != nil {
		t.Errorf("environment: %s, %v", got, err)
	}

	out, err = h.Run(ctx, shell("pwd; cat; umask", 5*time.Second)) // cat ends: stdin is /dev/null
	if err != nil || !strings.HasPrefix(string(out.Stdout), "/\n0") {
		t.Errorf("%q, %v", out.Stdout, err)
	}

	if _, err := h.Run(ctx, Command{argv: []string{"/usr/bin/no-such-program"}, timeout: time.Second}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
	for _, c := range []Command{{}, {argv: []string{"sh"}, timeout: time.Second}} {
		if _, err := h.Run(ctx, c); err == nil || !strings.Contains(err.Error(), "absolute") {
			t.Errorf("%q: %v", c, err)
		}
	}
	if _, err := h.Run(ctx, shell("kill -9 $$", 5*time.Second)); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("killed by a signal: %v", err)
	}
}

func TestRunCapsOutput(t *testing.T) {
	h := openDir(t, "/")
	out, err := h.Run(context.Background(), shell("head -c 20000000 /dev/zero; head -c 100000 /dev/zero >&2; echo done >&2", 20*time.Second))
	if !errors.Is(err, ErrTooLarge) || len(out.Stdout) != maxStdout || len(out.Stderr) != maxStderr {
		t.Errorf("%d bytes out, %d err, %v", len(out.Stdout), len(out.Stderr), err)
	}
}

// TestRunKillsTheGroup: the command's children go with it, also those that hold
// its output open.
func TestRunKillsTheGroup(t *testing.T) {
	h := openDir(t, "/")
	// The marker tells our sleeps from all others.
	const script = "sleep 4713 & sleep 4713 & echo started; wait"
	out, err := h.Run(context.Background(), shell(script, 300*time.Millisecond))
	if !errors.Is(err, ErrNoReply) || string(out.Stdout) != "started\n" {
		t.Errorf("%q, %v", out.Stdout, err)
	}
	eventually(t, "no child is left", func() bool { return sleepers(t, h, "4713") == 0 })
}

// TestRunDetachedChild: a child that left the group keeps the pipe, and neither
// the command nor the agent waits for it.
func TestRunDetachedChild(t *testing.T) {
	h := openDir(t, "/")
	// It outlives the command by a minute, and by far the test.
	before := sleepers(t, h, "60.4713")
	_, err := h.Run(context.Background(), shell("setsid sleep 60.4713 & sleep 100", 300*time.Millisecond))
	if !errors.Is(err, ErrNoReply) {
		t.Error(err)
	}
	eventually(t, "its child outlives it", func() bool { return sleepers(t, h, "60.4713") > before })
}

func TestRunCancelled(t *testing.T) {
	h := openDir(t, "/")
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := h.Run(ctx, shell("sleep 4714", time.Minute)); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoReply) {
		t.Errorf("error = %v", err)
	}
	if _, err := h.Run(ctx, shell("true", time.Minute)); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
}

func sleepers(t *testing.T, h *Host, length string) (n int) {
	t.Helper()
	procs, _, err := h.Root.readProcesses(nil, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if p.Comm != "sleep" {
			continue
		}
		cmdline, _ := h.ReadFile(context.Background(), "/proc/"+strconv.Itoa(p.PID)+"/cmdline")
		if string(cmdline) == "sleep\x00"+length+"\x00" {
			n++
		}
	}
	return n
}

func TestCommandsAreFixed(t *testing.T) {
	c := RPMQuery("a", "b")
	argv := c.Argv()
	if argv[0] != "/usr/bin/rpm" || argv[len(argv)-3] != "--" {
		t.Errorf("argv = %q", argv)
	}
	argv[0] = "/bin/rm"
	if c.Argv()[0] != "/usr/bin/rpm" {
		t.Error("a caller can change the command")
	}
}
