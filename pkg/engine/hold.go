package engine

import (
	"fmt"
	"slices"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// holds delays what is told of one probe: a problem must last before it is
// told, and be gone for a while before it is cleared, so that a flapping path
// makes one change of a condition and not a hundred.
type holds struct {
	rules   map[string]finding.Rule
	tracked map[finding.Key]*tracked
}

type tracked struct {
	last  finding.Finding
	first time.Time // seen without interruption since
	gone  time.Time // absent since; zero while present
	told  bool
	// returns is how often it came back before it was cleared.
	returns int
}

func newHolds(p probes.Probe) *holds {
	h := &holds{rules: map[string]finding.Rule{}, tracked: map[finding.Key]*tracked{}}
	for _, r := range p.Rules() {
		h.rules[r.Reason] = r
	}
	return h
}

// filter returns the findings to tell now, and after how long the answer may
// change by the passage of time alone (0: it will not). With prior, a problem
// of this probe was already told before the agent started, so nothing is held
// back: the condition must not clear and come again.
func (h *holds) filter(cfg *config.Sections, fs []finding.Finding, now time.Time, prior bool) (told []finding.Finding, again time.Duration) {
	soon := func(d time.Duration) {
		if again == 0 || d < again {
			again = d
		}
	}
	present := make(map[finding.Key]bool, len(fs))
	var (
		counts bool      // something that is here now makes the condition True
		held   time.Time // since when the oldest of those held back is here
	)
	for _, f := range fs {
		present[f.Key()] = true
		t := h.tracked[f.Key()]
		if t == nil || t.first.After(now) { // After: the clock was set back
			t = &tracked{first: now}
			h.tracked[f.Key()] = t
		}
		switch {
		case !t.gone.IsZero() && !t.told:
			t.first = now
		case !t.gone.IsZero():
			t.returns++
		}
		t.gone = time.Time{}
		f.Since = t.first
		if t.returns > 0 {
			// Beside the message and not in it: a count that moves is no change,
			// and what is not written again must not say an old one.
			f.Evidence = append(slices.Clip(f.Evidence), finding.Evidence{
				Source:   "passes since " + t.first.UTC().Format(time.RFC3339),
				Observed: fmt.Sprintf("it was gone and came back %d times", t.returns),
			})
		}
		t.last = f
		before, _ := cfg.HoldFor(h.rules[f.Reason])
		if f.Settled && cfg.Hold[f.Reason].Before == nil {
			before = 0
		}
		// What does not count is not held: muting a finding must show at once.
		if wait := before - now.Sub(t.first); wait > 0 && f.Counts() && !t.told && !prior {
			soon(wait)
			if held.IsZero() || t.first.Before(held) {
				held = t.first
			}
			continue
		}
		t.told = true
		told = append(told, f)
		counts = counts || f.Counts()
	}
	for key, t := range h.tracked {
		if present[key] {
			continue
		}
		if t.gone.IsZero() || t.gone.After(now) {
			t.gone = now
		}
		_, clear := cfg.HoldFor(h.rules[key.Reason])
		if t.told && t.last.Counts() {
			if wait := clear - now.Sub(t.gone); wait > 0 {
				soon(wait)
				told = append(told, t.last)
				continue
			}
			// One fault may pass from one finding to another: the mount of a
			// device that was pulled out goes, and only then is the device
			// missed. While the second is held back the first must not clear
			// the condition. What came later than this went is no successor,
			// so this ends with the hold.
			if !counts && !held.IsZero() && !held.After(t.gone) {
				told = append(told, t.last)
				continue
			}
		}
		delete(h.tracked, key)
	}
	finding.Sort(told)
	return told, again
}
