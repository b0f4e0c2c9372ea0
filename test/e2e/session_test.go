//go:build cluster

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// session is a shell on the node that stays, so that what is measured is not
// the start of an ssh command, which takes an emulated processor a while.
type session struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// at prints the node's time, in seconds since it booted. The clock of the day
// would not do, which some faults set; /proc/uptime counts hundredths.
const at = `at() { read up _ </proc/uptime; echo "AT $up"; }` + "\n"

func (w *world) session(t *testing.T) *session {
	t.Helper()
	s := &session{cmd: w.Node.Command(t.Context(), "exec bash --noprofile --norc")}
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.in.Close()
		s.cmd.Wait() // of interest is what it was asked, not how it ends
	})
	if _, err := s.raw(at); err != nil {
		t.Fatal(err)
	}
	return s
}

// do runs a script, which ends at the first command that fails, and returns
// what it printed.
func (s *session) do(script string) (string, error) {
	out, err := s.raw("(set -e\n" + script + "\n)")
	if err != nil {
		return "", fmt.Errorf("on the node: %w\n%s\n%s", err, script, out)
	}
	return out, nil
}

// raw runs lines in the shell itself.
func (s *session) raw(script string) (string, error) {
	late := time.AfterFunc(patience, func() { s.cmd.Process.Kill() })
	defer late.Stop()
	if _, err := fmt.Fprintf(s.in, "{ %s\n} </dev/null 2>&1; printf '\\n\\001%%s\\n' $?\n", script); err != nil {
		return "", err
	}
	var b strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if code, done := strings.CutPrefix(line, "\x01"); done {
			out := strings.TrimSpace(b.String())
			if code = strings.TrimSpace(code); code != "0" {
				return out, fmt.Errorf("exit code %s", code)
			}
			return out, nil
		}
		b.WriteString(line)
		if err != nil {
			return b.String(), err
		}
	}
}

var printedAt = regexp.MustCompile(`(?m)^AT ([0-9.]+)$`)

// printedTime returns the last time that a script printed with at.
func printedTime(out string) (float64, error) {
	all := printedAt.FindAllStringSubmatch(out, -1)
	if len(all) == 0 {
		return 0, fmt.Errorf("the script told no time: %q", out)
	}
	return strconv.ParseFloat(all[len(all)-1][1], 64)
}

// clock turns times of the node into times of this machine, by which the API
// server's answers are told.
type clock struct {
	booted time.Time
	// within is how far off it may be.
	within time.Duration
}

// clock compares both by asking for the time several times: the answer that came
// the fastest bounds the difference the closest.
func (s *session) clock() (clock, error) {
	var best clock
	for range 7 {
		asked := time.Now()
		out, err := s.raw("at")
		took := time.Since(asked)
		if err != nil {
			return clock{}, err
		}
		up, err := printedTime(out)
		if err != nil {
			return clock{}, err
		}
		// Half the way each, and the hundredths are cut off.
		if c := (clock{asked.Add(took / 2).Add(-seconds(up)), took/2 + 10*time.Millisecond}); best.within == 0 || c.within < best.within {
			best = c
		}
	}
	return best, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// here is a time of the node, in seconds since it booted, on this machine.
func (c clock) here(up float64) time.Time { return c.booted.Add(seconds(up)) }

// uevent is what the kernel told of a device.
type uevent struct {
	at           float64 // since boot
	action, path string
	properties   map[string]string
}

// uevents listens to what the kernel tells of devices, as the agent does.
type uevents struct {
	mu   sync.Mutex
	seen []uevent
}

var ueventHead = regexp.MustCompile(`^KERNEL\[([0-9.]+)\] (\w+) +(\S+)`)

func (w *world) uevents(t *testing.T) *uevents {
	t.Helper()
	u := &uevents{}
	cmd := w.Node.Command(t.Context(), "exec udevadm monitor --kernel --property --subsystem-match=block")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	listening := make(chan struct{})
	go func() {
		defer close(read)
		started := sync.OnceFunc(func() { close(listening) })
		for lines := bufio.NewScanner(out); lines.Scan(); {
			line := lines.Text()
			if strings.HasPrefix(line, "KERNEL - ") {
				started() // it says what it will print
			}
			u.line(line)
		}
	}()
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		<-read
		cmd.Wait()
	})
	select {
	case <-listening:
	case <-read:
		t.Fatal("udevadm monitor ended")
	}
	return u
}

func (u *uevents) line(line string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if m := ueventHead.FindStringSubmatch(line); m != nil {
		when, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return
		}
		u.seen = append(u.seen, uevent{at: when, action: m[2], path: m[3], properties: map[string]string{}})
		return
	}
	if key, value, ok := strings.Cut(line, "="); ok && len(u.seen) > 0 {
		u.seen[len(u.seen)-1].properties[key] = value
	}
}

// first returns the first event after a time of the node that is wanted.
func (u *uevents) first(after float64, wanted func(uevent) bool) (uevent, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	i := slices.IndexFunc(u.seen, func(e uevent) bool { return e.at >= after && wanted(e) })
	if i < 0 {
		return uevent{}, fmt.Errorf("no such uevent after %.2f s; %d others", after, len(u.seen))
	}
	return u.seen[i], nil
}
