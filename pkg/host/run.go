package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"syscall"
	"time"
)

const (
	maxStdout = 4 << 20
	maxStderr = 4 << 10
	// killGrace is how long after its time a command gets to die; a process in
	// uninterruptible sleep does not.
	killGrace = 2 * time.Second
)

// Run implements [View]. A command that can not be started outside the pod's
// cgroup is not started at all: under the pod's memory limit it could take the
// agent with it.
func (h *Host) Run(ctx context.Context, c Command) (Output, error) {
	if len(c.argv) == 0 || !path.IsAbs(c.argv[0]) {
		return Output{}, fmt.Errorf("command %q has no absolute path", c)
	}
	if h.observe {
		return Output{}, fmt.Errorf("%s: %w", c, errObserves)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	// The kill takes a moment after ctx; then the command is given up.
	deadline, _ := ctx.Deadline()
	patience, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline.Add(killGrace))
	defer cancel()
	if err := ctx.Err(); err != nil {
		return Output{}, fmt.Errorf("%s: not run: %w", c, err)
	}
	return bound(patience, &h.calls, c.String(), nil, func() (Output, error) { return h.run(ctx, c) })
}

func (h *Host) run(ctx context.Context, c Command) (Output, error) {
	cg, err := h.commandCgroup()
	if err != nil {
		return Output{}, fmt.Errorf("%s: not run, because it would share the memory limit of the agent's pod: %w", c, err)
	}
	defer cg.close()
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/root"}, c.env...)
	stdout, stderr := &capped{limit: maxStdout}, &capped{limit: maxStderr}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// No Pdeathsig: it fires when the thread that started the child ends, and
	// that thread may end before the child.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cg.unified >= 0 {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cg.unified
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// Someone outside the group may hold the pipes open.
	cmd.WaitDelay = killGrace / 2

	// The child inherits the namespaces of the thread that starts it.
	if err := h.ns.do(allNamespaces, cmd.Start); err != nil {
		return Output{}, err
	}
	if err := cg.adopt(cmd.Process.Pid); err != nil {
		cmd.Cancel()
		cmd.Wait()
		return Output{}, fmt.Errorf("%s: stopped: %w", c, err)
	}
	err = cmd.Wait()
	out := Output{Stdout: stdout.buf.Bytes(), Stderr: stderr.buf.Bytes()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		reason := ErrNoReply
		if errors.Is(ctx.Err(), context.Canceled) {
			reason = context.Canceled
		}
		return out, fmt.Errorf("%s: %w, killed", c, reason)
	case errors.As(err, &exit) && exit.Exited():
		out.Code = exit.ExitCode()
	case err != nil:
		return out, fmt.Errorf("%s: %w", c, err)
	}
	if stdout.over {
		return out, fmt.Errorf("%s: output %w of %d bytes", c, ErrTooLarge, maxStdout)
	}
	return out, nil
}

// capped keeps the first bytes written and swallows the rest, so that the
// command is not stopped by a full pipe.
type capped struct {
	buf   bytes.Buffer
	limit int
	over  bool
}

func (w *capped) Write(p []byte) (int, error) {
	room := w.limit - w.buf.Len()
	if len(p) > room {
		w.over = true
		w.buf.Write(p[:room])
	} else {
		w.buf.Write(p)
	}
	return len(p), nil
}
