package hosttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/hosthygiene/agent/pkg/host"
)

// witness is a test that notes its failures instead of failing.
type witness struct {
	testing.TB
	failures []string
}

func (w *witness) Helper() {}
func (w *witness) Errorf(format string, args ...any) {
	w.failures = append(w.failures, fmt.Sprintf(format, args...))
}

// TestUnlistedQuestions: what a case does not list fails it, by name, even when
// the probe swallows the error.
func TestUnlistedQuestions(t *testing.T) {
	ctx := context.Background()
	for want, question := range map[string]func(*Host) error{
		"unit x.service":       func(h *Host) error { _, err := h.Units(ctx, "known.service", "x.service"); return err },
		"adjtimex":             func(h *Host) error { _, err := h.Adjtimex(ctx); return err },
		"ptp/dev/ptp0":         func(h *Host) error { _, _, err := h.PTPOffset(ctx, "/dev/ptp0"); return err },
		"dm":                   func(h *Host) error { _, err := h.DeviceMapper(ctx); return err },
		"statmount /data":      func(h *Host) error { _, err := h.StatMount(ctx, "/data"); return err },
		"lock /var/lock":       func(h *Host) error { _, err := h.LockHolder(ctx, "/var/lock"); return err },
		"kmsg":                 func(h *Host) error { _, err := h.KernelLog(ctx); return err },
		"socket/unix/@x":       func(h *Host) error { _, err := h.Dial(ctx, "unix", "@x"); return err },
		"bus/a /b c":           func(h *Host) error { _, _, err := h.BusProperties(ctx, "a", "/b", "c"); return err },
		"run//usr/bin/rpm -q ": func(h *Host) error { _, err := h.Run(ctx, host.RPMQuery("x")); return err },
	} {
		w := &witness{TB: t}
		h := Parse(w, "-- units --\nknown.service\n")
		if err := question(h); err == nil {
			t.Errorf("%s: answered", want)
		}
		if len(w.failures) != 1 || !strings.Contains(w.failures[0], want) {
			t.Errorf("%s: failures %q", want, w.failures)
		}
	}
}

func TestListedAnswers(t *testing.T) {
	ctx := context.Background()
	h := Parse(t, `-- tree/etc/fstab --
x
\ No newline at end of file
-- treebin/proc/7/comm --
a\x00b\xff
-- links --
/var/run -> /run
/etc/out -> /../../../../etc/hostname
-- tree/run/inside --
inside
-- nodes --
/dev/sda b 8:0
-- attrs --
/etc/fstab mode=0600 uid=7
-- procs --
42 sleeper ppid=7 state=D threads=3
2 kthreadd kthread
-- units --
a.service mainpid=42 active=failed
*
-- locks --
/l pid=42
-- statmount --
/ok dev=8:1 ro
/nfs hangs=2026-01-02T03:04:05Z
/bad error=EIO
-- dm --
device m mpath-1 253:0 suspended open=2
table 0 8 multipath t t
status 0 8 multipath s s
`)
	if data, err := h.ReadFile(ctx, "/etc/fstab"); string(data) != "x" || err != nil {
		t.Errorf("fstab = %q, %v", data, err)
	}
	if data, err := h.ReadFile(ctx, "/proc/7/comm"); string(data) != "a\x00b\xff\n" && string(data) != "a\x00b\xff" || err != nil {
		t.Errorf("comm = %q, %v", data, err)
	}
	if data, err := h.ReadFile(ctx, "/var/run/inside"); string(data) != "inside\n" || err != nil {
		t.Errorf("through an absolute link: %q, %v", data, err)
	}
	// The machine's own /etc/hostname must not be seen through the link.
	if data, err := h.ReadFile(ctx, "/etc/out"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("out of the tree: %q, %v", data, err)
	}
	if st, err := h.Stat(ctx, "/dev/sda"); err != nil || st.Rdev != (host.DevNum{Major: 8}) || st.Mode.Type() != fs.ModeDevice {
		t.Errorf("node: %+v, %v", st, err)
	}
	if st, err := h.Stat(ctx, "/etc/fstab"); err != nil || st.Mode.Perm() != 0o600 || st.UID != 7 {
		t.Errorf("attrs: %+v, %v", st, err)
	}
	procs, err := h.Processes(ctx)
	if err != nil || len(procs) != 2 || !procs[0].Kernel || procs[1].State != 'D' || procs[1].Threads != 3 {
		t.Errorf("procs: %+v, %v", procs, err)
	}
	units, err := h.Units(ctx, "b.service", "a.service")
	if err != nil || units[0].Load != "not-found" || units[1].MainPID != 42 || units[1].ID != "a.service" || units[1].Running() {
		t.Errorf("units: %+v, %v", units, err)
	}
	if l, err := h.LockHolder(ctx, "/l"); !l.Held || l.PID != 42 || err != nil {
		t.Errorf("lock: %+v, %v", l, err)
	}
	if st, err := h.StatMount(ctx, "/ok"); !st.ReadOnly || st.Dev.Minor != 1 || err != nil {
		t.Errorf("mount: %+v, %v", st, err)
	}
	if st, err := h.StatMount(ctx, "/nfs"); st.Pending.IsZero() || !errors.Is(err, host.ErrNoReply) {
		t.Errorf("hanging mount: %+v, %v", st, err)
	}
	devs, err := h.DeviceMapper(ctx)
	if err != nil || len(devs) != 1 || !devs[0].Suspended || devs[0].Targets[0].Table != "t t" || devs[0].Targets[0].Status != "s s" {
		t.Errorf("dm: %+v, %v", devs, err)
	}
}

func TestPasses(t *testing.T) {
	ctx := context.Background()
	h := Parse(t, `-- tree/a --
one
-- tree/gone --
here
-- tree/etc/systemd/getty@.service --
a template, no pass
-- adjtimex --
state=0 maxerror=1ms
-- procs --
5 first
-- tree/a@2 --
two
-- tree/gone@2 --
absent
-- adjtimex@2 --
state=5 maxerror=16s
-- procs@2 --
6 second
`)
	check := func(a string, procs, state int) {
		t.Helper()
		data, err := h.ReadFile(ctx, "/a")
		if string(data) != a || err != nil {
			t.Errorf("a = %q, %v", data, err)
		}
		if p, err := h.Processes(ctx); len(p) != procs || err != nil {
			t.Errorf("processes: %+v, %v", p, err)
		}
		if tx, err := h.Adjtimex(ctx); tx.State != state || err != nil {
			t.Errorf("adjtimex: %+v, %v", tx, err)
		}
	}
	check("one\n", 1, 0)
	if _, err := h.Stat(ctx, "/etc/systemd/getty@.service"); err != nil {
		t.Error(err)
	}
	h.Pass(2)
	check("two\n", 2, 5) // the process table of the first pass is not remembered
	if _, err := h.Stat(ctx, "/gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("gone: %v", err)
	}
}

func TestDialogue(t *testing.T) {
	const text = `> hex 0601 SSSSSSSS 00
< hex 0602 SSSSSSSS ff
> hex 07
< silence
`
	dial := func(tb testing.TB) func(request string) (string, error) {
		h := Parse(tb, "-- socket/udp/127.0.0.1:323 --\n"+text)
		c, err := h.Dial(context.Background(), "udp", "127.0.0.1:323")
		if err != nil {
			t.Fatal(err)
		}
		return func(request string) (string, error) {
			if _, err := c.Write([]byte(request)); err != nil {
				return "", err
			}
			buf := make([]byte, 64)
			n, err := c.Read(buf)
			return string(buf[:n]), err
		}
	}
	ask := dial(t)
	for _, seq := range []string{"abcd", "\x00\x00\x00\x01", "ab\x00\x00"} {
		// Padding behind the request does not matter.
		if got, err := ask("\x06\x01" + seq + "\x00\x00\x00"); got != "\x06\x02"+seq+"\xff" || err != nil {
			t.Errorf("sequence %q: %q, %v", seq, got, err)
		}
	}
	if got, err := ask("\x07"); got != "" || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("silence: %q, %v", got, err)
	}
	w := &witness{TB: t}
	if got, err := dial(w)("\x09"); err == nil {
		t.Errorf("an unexpected request drew %q", got)
	}
	if len(w.failures) != 1 || !strings.Contains(w.failures[0], "unexpected request 09") {
		t.Errorf("failures %q", w.failures)
	}
}

func TestMultipathdDialogue(t *testing.T) {
	h := Parse(t, `-- socket/unix/@/org/kernel/linux/storage/multipathd --
> mpath show maps json
< mpath
{"maps": []}
> mpath shutdown
< close
-- socket/unix/run/refuses --
refused
-- socket/unix/run/missing --
absent
`)
	ctx := context.Background()
	c, err := h.Dial(ctx, "unix", "@/org/kernel/linux/storage/multipathd")
	if err != nil {
		t.Fatal(err)
	}
	// The request may come in pieces.
	for _, part := range []string{"\x0f\x00\x00\x00", "\x00\x00\x00\x00", "show maps", " json\x00"} {
		if _, err := c.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 8)
	if n, err := c.Read(buf); n != 8 || err != nil || string(buf) != "\x0e\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("length %q, %d, %v", buf, n, err)
	}
	buf = make([]byte, 64)
	if n, err := c.Read(buf); string(buf[:n]) != "{\"maps\": []}\n\x00" || err != nil {
		t.Errorf("body %q, %v", buf[:n], err)
	}
	if _, err := h.Dial(ctx, "unix", "/run/refuses"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("refused: %v", err)
	}
	if _, err := h.Dial(ctx, "unix", "/run/missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}
