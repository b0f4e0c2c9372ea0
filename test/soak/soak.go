// Package soak plans faults at random and judges what was told of them: the log
// of what was done to a node is the only truth. It knows neither the node nor the
// agent; package e2e makes the faults and watches.
package soak

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Unknown is the reason under which a probe that could not tell is judged.
const Unknown = "Unknown"

// Saying is what a probe says: one of its reasons, or Unknown.
type Saying struct{ Probe, Reason string }

func (s Saying) String() string { return s.Probe + "/" + s.Reason }

// Tell is what must be told of a fault.
type Tell struct {
	Probe string
	// Reasons are the ways to tell it; one is enough.
	Reasons []string
	// Names is what the condition's message must name.
	Names string
	// Within is how long after the fault it may take at most.
	Within time.Duration
}

// Fault is a kind of fault.
type Fault struct {
	Name string
	// Takes are what it breaks or hides: faults that share one are never there
	// at the same time.
	Takes []string
	Tells []Tell
	// May are reasons that may follow from it.
	May []Saying
	// Clears is how long after the repair anything may be told of it.
	Clears time.Duration
	// Momentary faults are over when they have happened; what is told of them
	// goes by itself, within Clears.
	Momentary bool
	// Alone: it stands in the way of making and mending others.
	Alone bool
}

func (f Fault) explains(s Saying) bool {
	return slices.Contains(f.May, s) || slices.ContainsFunc(f.Tells, func(t Tell) bool {
		return t.Probe == s.Probe && slices.Contains(t.Reasons, s.Reason)
	})
}

// Planned is a fault of a plan.
type Planned struct {
	Fault int // in the list it was planned from
	// At is when, after the beginning; For is how long it lasts then, and
	// longer where it has not been told yet.
	At, For time.Duration
	// Brief faults are repaired before they must be told, and may be told or not.
	Brief bool
}

// Step is the beginning or the end of a planned fault.
type Step struct {
	At      time.Duration
	Planned int
	Begins  bool
}

// Pace says how dense a plan is.
type Pace struct {
	// Length is how long faults are made.
	Length time.Duration
	// Gap is the mean time between two.
	Gap time.Duration
	// A fault lasts for Least to Most, or, if it is one of those that are brief,
	// for less than Brief. One in eight is.
	Least, Most, Brief time.Duration
}

const briefShare = 8

// Plan draws faults at random, the same for the same seed, list and pace: each
// kind once before any comes again, as far as what they take allows. What one
// takes it leaves alone until nothing is told of it any more.
func Plan(seed uint64, faults []Fault, p Pace) []Planned {
	r := rand.New(rand.NewPCG(seed, 0x736f616b))
	upTo := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(max(d, 1)))) }
	free := map[string]time.Duration{} // what is taken, until when
	var deck []int
	var plan []Planned
	var over time.Duration // when all that was planned so far is mended
	for at := upTo(p.Gap); ; at += upTo(2 * p.Gap) {
		possible := func(f int) bool {
			// What nobody can mend is over in time.
			if faults[f].Momentary && at+faults[f].Clears >= p.Length {
				return false
			}
			return !slices.ContainsFunc(faults[f].Takes, func(what string) bool { return free[what] > at })
		}
		if len(deck) == 0 {
			deck = r.Perm(len(faults))
		}
		next := Planned{Fault: -1, At: at}
		if i := slices.IndexFunc(deck, possible); i >= 0 {
			next.Fault = deck[i]
			deck = slices.Delete(deck, i, i+1)
		} else if all := r.Perm(len(faults)); slices.ContainsFunc(all, possible) {
			next.Fault = all[slices.IndexFunc(all, possible)]
		}
		next.For = p.Least + upTo(p.Most-p.Least)
		if r.IntN(briefShare) == 0 {
			next.Brief, next.For = true, upTo(p.Brief)
		}
		if next.Fault >= 0 && faults[next.Fault].Alone {
			next.At = max(at, over)
		}
		if next.At+next.For >= p.Length {
			return plan
		}
		if next.Fault < 0 {
			continue
		}
		f := faults[next.Fault]
		if f.Momentary {
			next.Brief, next.For = false, 0
		}
		for _, what := range f.Takes {
			free[what] = next.At + next.For + f.Clears
		}
		plan = append(plan, next)
		over = max(over, next.At+next.For)
		if f.Alone {
			at = over
		}
	}
}

// Steps are what there is to do, in order.
func Steps(plan []Planned) []Step {
	var steps []Step
	for i, p := range plan {
		steps = append(steps, Step{p.At, i, true}, Step{p.At + p.For, i, false})
	}
	slices.SortStableFunc(steps, func(a, b Step) int { return int(a.At - b.At) })
	return steps
}

// Made is a line of the log: a fault that was made, and when. From is before the
// first thing was done for it, Begun when it was there, Mended before the repair,
// To after it.
type Made struct {
	Fault                   Fault
	Brief                   bool
	From, Begun, Mended, To time.Time
}

func (m Made) String() string {
	brief := ""
	if m.Brief {
		brief = " (brief)"
	}
	clock := func(t time.Time) string { return t.UTC().Format("15:04:05.0") }
	return fmt.Sprintf("%s to %s %s%s", clock(m.From), clock(m.To), m.Fault.Name, brief)
}

// Span is a time during which something was said without interruption.
type Span struct {
	Saying
	From, To time.Time
	// Message is what the condition said of it; empty where there is none, as of
	// a metric.
	Message string
	// Via says where it was seen.
	Via string
}

// Verdict is what was wrong, and how long telling took.
type Verdict struct {
	Missed, False, Stuck []string
	// Told is how long it took to tell each fault that was not brief, by name.
	Told map[string][]time.Duration
}

// Clean says whether nothing was wrong.
func (v Verdict) Clean() bool { return len(v.Missed)+len(v.False)+len(v.Stuck) == 0 }

func (v Verdict) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d missed, %d false, %d stuck\n", len(v.Missed), len(v.False), len(v.Stuck))
	for _, list := range []struct {
		what  string
		lines []string
	}{{"MISSED", v.Missed}, {"FALSE", v.False}, {"STUCK", v.Stuck}} {
		for _, line := range list.lines {
			fmt.Fprintf(&b, "%s %s\n", list.what, line)
		}
	}
	return b.String()
}

// Judge compares what was said with what was done. metrics and conditions are
// what was seen of either, each with every reason that was said; of a condition
// only the worst one. A fault is missed when the metrics do not have its reason in
// time, or when its condition does not name it in time.
func Judge(log []Made, metrics, conditions []Span) Verdict {
	v := Verdict{Told: map[string][]time.Duration{}}
	for _, m := range log {
		if m.Brief {
			continue
		}
		var told time.Duration
		for _, t := range m.Fault.Tells {
			limit := m.Begun.Add(t.Within)
			during := func(s Span) bool { return s.From.Before(limit) && s.To.After(m.From) && s.Probe == t.Probe }
			i := slices.IndexFunc(conditions, func(s Span) bool {
				return during(s) && t.Told(s.Reason, s.Message)
			})
			switch {
			case i < 0:
				v.Missed = append(v.Missed, fmt.Sprintf("%s: no condition of %s says %s of %q within %s", m, t.Probe, strings.Join(t.Reasons, " or "), t.Names, t.Within))
				continue
			case !slices.ContainsFunc(metrics, func(s Span) bool { return during(s) && slices.Contains(t.Reasons, s.Reason) }):
				v.Missed = append(v.Missed, fmt.Sprintf("%s: no metric of %s says %s within %s", m, t.Probe, strings.Join(t.Reasons, " or "), t.Within))
				continue
			}
			told = max(told, conditions[i].From.Sub(m.From))
		}
		v.Told[m.Fault.Name] = append(v.Told[m.Fault.Name], told)
	}
	for _, s := range slices.Concat(metrics, conditions) {
		at, last := unexplained(log, s)
		if at.IsZero() {
			continue
		}
		line := fmt.Sprintf("%s in %s from %s to %s", s.Saying, s.Via, s.From.UTC().Format("15:04:05.0"), s.To.UTC().Format("15:04:05.0"))
		if s.Message != "" {
			line += ": " + s.Message
		}
		if last == nil {
			v.False = append(v.False, line)
		} else {
			v.Stuck = append(v.Stuck, fmt.Sprintf("%s; the last that explains it: %s", line, last))
		}
	}
	return v
}

// Told says whether a condition's reason and message tell the fault: as the
// reason, or, where another is worse, in the message, which is cut off where
// there are too many.
func (t Tell) Told(reason, message string) bool {
	named := strings.Contains(message, t.Names)
	return named && slices.Contains(t.Reasons, reason) || reason != Unknown && (named && t.Names != "" || strings.HasSuffix(message, " more"))
}

// unexplained returns when a saying was first without a fault that explains it,
// zero for never, and the fault that did until then, if any.
func unexplained(log []Made, s Span) (at time.Time, last *Made) {
	at = s.From
	for at.Before(s.To) || at.Equal(s.From) {
		until := at
		for i, m := range log {
			if !m.Fault.explains(s.Saying) || m.From.After(at) {
				continue
			}
			if end := m.To.Add(m.Fault.Clears); end.After(until) {
				until, last = end, &log[i]
			}
		}
		if until.Equal(at) {
			return at, last
		}
		at = until
	}
	return time.Time{}, nil
}
