package remedy

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Annotate tells beside findings that are still there how the last attempt to
// cure them failed, from what is on record on the host. Without the right to read
// the record nothing is added: it is the probes that say what root would see.
func Annotate(ctx context.Context, files host.Files, reports []finding.Report) error {
	records, err := readRecords(ctx, files)
	past := pastOf(records)
	for _, r := range reports {
		for i, f := range r.Findings {
			r.Findings[i] = withAttempt(past, r.Probe, f)
		}
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// withAttempt adds the program's own last lines to a finding whose remedy failed
// when it was last tried. The finding given is not changed: others hold it.
func withAttempt(past []Result, probe string, f finding.Finding) finding.Finding {
	for _, r := range slices.Backward(past) {
		if r.Outcome == Skipped || !slices.ContainsFunc(r.Why, func(w Why) bool {
			return w.Probe == probe && w.Reason == f.Reason && w.Subject == f.Subject
		}) {
			continue
		}
		if r.Outcome != Failed && r.Outcome != RolledBack {
			return f
		}
		// It stands in conditions too, where no initiator name may be.
		f.Message += "; its remedy failed: " + withoutNames(cut(r.Message, failureText))
		observed := r.Message
		if len(r.Output) > 0 {
			observed = strings.Join(r.Output[max(0, len(r.Output)-evidenceLines):], " / ")
		}
		f.Evidence = append(slices.Clip(f.Evidence), finding.Evidence{
			Source:   "remedy " + r.Step + " at " + r.Ended.UTC().Format(time.RFC3339),
			Observed: withoutNames(observed),
			Expected: "the step succeeds",
		})
		return f
	}
	return f
}

// evidenceLines bounds what is shown of a program's last lines; all that is kept
// stands in the record.
const evidenceLines = 5
