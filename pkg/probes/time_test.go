package probes

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"
)

func TestTime(t *testing.T) { runCases(t, "time", DefaultTime) }

func TestTimeValidate(t *testing.T) {
	p := DefaultTime()
	p.MaxOffset, p.CriticalOffset = Duration(2*time.Second), Duration(time.Second)
	err := p.Validate()
	if err == nil || err.Error() != "criticalOffset: 1s is below maxOffset 2s: want at least that" {
		t.Errorf("got %v", err)
	}
}

// The values beside the hex are what chronyc printed for the same bytes.
func TestChronyFloat(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"04800000": time.Second,
		"00000000": 0,
		"01000000": -500 * time.Millisecond,
	} {
		b, _ := hex.DecodeString(in)
		if got := chronyFloat(b); (got - want).Abs() > time.Microsecond {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
	for _, in := range []string{"7effffff", "7f000000"} { // more than a century
		b, _ := hex.DecodeString(in)
		if got := chronyFloat(b); got.Abs() > 101*365*24*time.Hour {
			t.Errorf("%s: got %s, want saturation", in, got)
		}
	}
}

func FuzzChronyReply(f *testing.F) {
	f.Add(mustHex("060200000021000500000000000000000102030100000000000000000a0002020a0002020000000000000000000000000001000000090000000000006b02026007215edbe2a074b6e14ad93ce695ce9c0a94e7ccf35c375f00ac9e95ecd40855e893280f0c8115e4"))
	f.Add(mustHex("06020000000f000300000000000000000102030400000000000000000a000202000000000000000000000000000100000004000800000000000000ff0000000fe9616610e96cb87bece0e180"))
	f.Add(mustHex("06020000000e0002000000000000000001020303000000000000000000000001"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, command := range []uint16{chronyTracking, chronyNSources, chronySourceData} {
			if checkChronyHeader(data, command) != nil {
				continue
			}
			if tr, err := parseChronyTracking(data); err == nil && tr.delay >= 0 && tr.disp >= 0 && tr.bound() < 0 {
				t.Errorf("error bound %s", tr.bound())
			}
			if s, err := parseChronySource(data); err == nil && s.stateName() == "" {
				t.Error("a source without a state")
			}
			parseChronyNSources(data)
		}
	})
}

func FuzzNTPMessage(f *testing.F) {
	f.Add(0.0, 1e15, 1e15, 0.0, 1.0)
	f.Add(1795295386482022.0, 1795295386536528.0, 1795295386540411.0, 1795295386490829.0, 1.0)
	f.Fuzz(func(t *testing.T, o, r, x, d, n float64) {
		tuple := []any{0.0, 4.0, 4.0, 2.0, -20.0, 1998.0, 4989.0, []any{}, o, r, x, d, false, n, 0.0}
		m, err := parseNTPMessage(tuple)
		if err == nil && m.packets != 0 && m.offset.Abs() > 201*365*24*time.Hour {
			t.Errorf("offset %s", m.offset)
		}
	})
}

func FuzzProcStatusCapabilities(f *testing.F) {
	f.Add([]byte("Name:\tchronyd\nCapEff:\t0000000002000400\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if may, known := canSetTime(data); may && !known {
			t.Error("a capability out of nothing")
		}
		cgroupOf(data)
		chronydIsReadOnly(data)
	})
}

func mustHex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// A chronyd that hung and goes on says for a while that nothing is synchronised,
// as one does that has just started: neither is told at once.
func TestDaemonThatGoesOnIsAtItsStart(t *testing.T) {
	memory, now := NewMemory(), time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	pass := func(after time.Duration, answers bool) bool {
		now = now.Add(after)
		memory.Begin()
		c := clockCheck{in: Input{Memory: memory, Now: now}, daemons: []timeDaemon{{pid: 350, started: 7}}}
		if answers {
			c.works()
		}
		return c.warm
	}
	for i, want := range []struct {
		after         time.Duration
		answers, warm bool
	}{{0, true, false}, {daemonStart, true, true}, {time.Minute, true, true}, {time.Minute, false, false}, {time.Second, true, false}, {daemonStart, true, true}} {
		if got := pass(want.after, want.answers); got != want.warm {
			t.Errorf("pass %d: warm %t, want %t", i+1, got, want.warm)
		}
	}
}
