package remedy

import (
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
)

// Only the last attempt at a finding counts, and what it says of an initiator
// stays on the host.
func TestAnnotate(t *testing.T) {
	h := newFakeHost(t, nil)
	at := time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)
	why := func(subject string) []Why {
		return []Why{{Probe: "packages", Reason: "PackageMissing", Subject: subject}}
	}
	s, err := openStore(t.Context(), h, "one", at)
	if err != nil {
		t.Fatal(err)
	}
	s.record.Results = []Result{
		{Step: "packages", Why: why("mended-later"), Outcome: Failed, Message: "apt-get says: E: no", Ended: at},
		{Step: "packages", Why: append(why("a"), why("b")...), Outcome: Failed, Message: "apt-get says: E: Unable to locate package a (exit 100)", Ended: at,
			Output: []string{"1", "2", "Reading package lists...", "Building dependency tree...", "Reading state information...", "iqn.2020-01.org.example:secret", "E: Unable to locate package a"}},
		{Step: "packages", Why: why("mended-later"), Outcome: Applied, Ended: at.Add(time.Minute)},
		{Step: "packages", Why: why("a"), Outcome: Skipped, Ended: at.Add(time.Hour)},
	}
	if err := s.save(t.Context()); err != nil {
		t.Fatal(err)
	}
	was := []finding.Evidence{{Source: "/var/lib/dpkg/status", Observed: "not installed"}}
	missing := func(subject string) finding.Finding {
		return finding.Finding{Reason: "PackageMissing", Subject: subject, Message: subject + " is missing", Evidence: was}
	}
	reports := []finding.Report{{Probe: "packages", Findings: []finding.Finding{missing("a"), missing("b"), missing("mended-later"), missing("other")}}}
	if err := Annotate(t.Context(), h, reports); err != nil {
		t.Fatal(err)
	}
	for i, f := range reports[0].Findings {
		if i > 1 {
			if len(f.Evidence) != 1 || f.Message != f.Subject+" is missing" {
				t.Errorf("%+v", f)
			}
			continue
		}
		if want := f.Subject + " is missing; its remedy failed: apt-get says: E: Unable to locate package a (exit 100)"; f.Message != want {
			t.Errorf("got  %q\nwant %q", f.Message, want)
		}
		want := finding.Evidence{Source: "remedy packages at 2026-11-22T01:00:00Z",
			Observed: "Reading package lists... / Building dependency tree... / Reading state information... / iqn.2020-01.… / E: Unable to locate package a",
			Expected: "the step succeeds"}
		if len(f.Evidence) != 2 || f.Evidence[1] != want {
			t.Errorf("%+v", f.Evidence)
		}
	}
	h.write(t, plansDir[1:]+"/20261122T020000Z-two/record.json", "{")
	if err := Annotate(t.Context(), h, reports); err == nil || !strings.Contains(err.Error(), "two/record.json") {
		t.Errorf("an unreadable record: %v", err)
	}
}
