package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// supervisor starts processes that must not outlive this one.
//
// The kernel's parent-death signal does that, but it watches the thread that
// forked, not the process: a child would be killed as soon as the Go runtime
// lets that thread go. So one goroutine locked to one thread does all the
// starting and stays until the supervisor is closed.
type supervisor struct {
	starts chan func()
	once   sync.Once
}

func newSupervisor() *supervisor {
	s := &supervisor{starts: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for start := range s.starts {
			start()
		}
	}()
	return s
}

// close ends the thread, and with it whatever was not stopped before.
func (s *supervisor) close() { s.once.Do(func() { close(s.starts) }) }

// process is a running child, known by its handle and never by its name.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // what Wait said; read it after done is closed
}

// start runs a program with its output in dir/name.log.
func (s *supervisor) start(dir, name string, argv ...string) (*process, error) {
	logPath := filepath.Join(dir, name+".log")
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer logFile.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// A process group of its own keeps the terminal's Ctrl-C from it: we stop
	// things in order ourselves.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	s.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &process{name: name, log: logPath, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// running says whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop asks, waits and then insists. It returns when the process is gone.
func (p *process) stop(grace time.Duration) error {
	if p == nil || !p.running() {
		return nil
	}
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	// A stopped process does not act on SIGTERM until it continues.
	if err := p.signal(syscall.SIGCONT); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	}
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

func (p *process) signal(sig syscall.Signal) error {
	if p == nil {
		return fmt.Errorf("sending %v: %w", sig, errNotOurs)
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("sending %v to %s: %w", sig, p.name, err)
	}
	return nil
}

// failure describes how the process ended, with the last lines it wrote.
func (p *process) failure() error {
	return fmt.Errorf("%s ended: %v; the end of %s:\n%s", p.name, p.err, p.log, tail(p.log, 15))
}

// until calls probe every interval until it succeeds, the process dies, or the
// context ends; then it says what the probe last said.
func (p *process) until(ctx context.Context, what string, interval time.Duration, probe func(context.Context) error) error {
	var done chan struct{} // of a process that another program started: never
	var log string
	if p != nil {
		done, log = p.done, p.log
	}
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("waiting for %s: %w", what, p.failure())
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w (last: %w); the end of %s:\n%s", what, context.Cause(ctx), err, log, tail(log, 15))
		case <-time.After(interval):
		}
	}
}

// tail returns the last lines of a text file, or why it could not.
func tail(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// run runs a program to its end and returns what it printed; the error carries
// what it complained about.
func run(ctx context.Context, dir string, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	if env != nil {
		cmd.Env = append(os.Environ(), env...)
	}
	return output(cmd)
}

// output runs a prepared command like run does.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		complaint := strings.TrimSpace(stderr.String())
		if len(complaint) > 4000 {
			complaint = "…" + complaint[len(complaint)-4000:]
		}
		return stdout.String(), fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, complaint)
	}
	return stdout.String(), nil
}
