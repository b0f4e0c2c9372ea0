package probes

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Explain implements [Explainer]: every clock and source that has a say in what
// this host takes for the time.
func (p Time) Explain(ctx context.Context, in Input) ([]Table, error) {
	var errs []error
	clocks := Table{Title: "clocks", Header: []string{"CLOCK", "STATE", "OFFSET", "ERROR AT MOST", "FOLLOWS"}}
	if tx, err := in.Host.Adjtimex(ctx); err != nil {
		errs = append(errs, fmt.Errorf("reading the kernel clock: %w", err))
	} else {
		state := "synchronised"
		if tx.MaxError >= ntpPhaseLimit {
			state = "not synchronised"
		}
		clocks.Rows = append(clocks.Rows, []string{"kernel, adjtimex(2)", state, short(tx.Offset), short(tx.MaxError), "-"})
	}
	tables := []Table{clocks}
	daemons, err := runningTimeDaemons(ctx, in.Host)
	if err != nil {
		errs = append(errs, fmt.Errorf("looking for time daemons: %w", err))
	}
	for _, d := range daemons {
		name := fmt.Sprintf("%s (PID %d)", d.name, d.pid)
		if d.name != "chronyd" {
			tables[0].Rows = append(tables[0].Rows, []string{name, "runs in " + d.cgroup, "-", "-", "-"})
			continue
		}
		s, err := askChrony(ctx, in.Host)
		if err != nil {
			tables[0].Rows = append(tables[0].Rows, []string{name, "does not answer", "-", "-", "-"})
			errs = append(errs, fmt.Errorf("asking chronyd: %w", err))
			continue
		}
		t := s.tracking
		state, follows := "synchronised", refName(t.refID)
		if t.leap == leapUnsynchronised {
			state = "not synchronised"
		}
		if t.address.IsValid() {
			follows = t.address.String()
		}
		tables[0].Rows = append(tables[0].Rows, []string{name, state, short(t.offset), short(t.bound()), fmt.Sprintf("%s, stratum %d", follows, t.stratum)})
		sources := Table{Title: "sources of chronyd, asked on " + s.via, Header: []string{"SOURCE", "STATE", "STRATUM", "REACH", "OFFSET", "ERROR AT MOST", "LAST SAMPLE", "POLL"}}
		for _, src := range s.sources {
			name, offset, bound, last := "a reference clock", "-", "-", "none yet"
			if src.address.IsValid() {
				name = src.address.String()
			}
			if !src.never {
				offset, bound, last = short(src.offset), short(src.bound), short(src.since)+" ago"
			}
			sources.Rows = append(sources.Rows, []string{name, src.stateName(), strconv.Itoa(int(src.stratum)), reachBits(src.reach), offset, bound, last, pollName(src.poll)})
		}
		if len(sources.Rows) == 0 {
			sources.Rows = append(sources.Rows, []string{"none is configured", "", "", "", "", "", "", ""})
		}
		tables = append(tables, sources)
	}
	return tables, errors.Join(errs...)
}

// reachBits shows the last eight polls, the latest on the right: '+' answered,
// '-' not.
func reachBits(reach uint16) string {
	var b strings.Builder
	for bit := 7; bit >= 0; bit-- {
		if reach>>bit&1 == 1 {
			b.WriteByte('+')
		} else {
			b.WriteByte('-')
		}
	}
	return b.String()
}

// pollName turns log2 seconds into a duration; below a second there are polls
// of local network sources (chrony.conf(5), minpoll).
func pollName(log2 int) string {
	if log2 < 0 {
		return fmt.Sprintf("1/%d s", 1<<min(-log2, 16))
	}
	return fmt.Sprintf("%d s", 1<<min(log2, 30))
}
