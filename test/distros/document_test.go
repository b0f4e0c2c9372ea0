package distros

import (
	"errors"
	"fmt"
	"strings"

	"github.com/hosthygiene/agent/pkg/finding"
)

// String is what the agent says, in full.
func (j judged) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "class %s: %s\n", j.os.Class, j.os.Why)
	for _, r := range j.reports {
		fmt.Fprintf(&b, "%s %s: %s\n", r.Probe, r.Status, r.Summary)
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "  %s %s %s: %s\n", f.Severity, f.Reason, f.Subject, f.Message)
			if f.Remedy != nil {
				fmt.Fprintf(&b, "    remedy: %s %s\n", f.Remedy.Action, f.Remedy.Subject)
			}
		}
		for _, err := range unjoin(r.Err) {
			fmt.Fprintf(&b, "  error: %v\n", err)
		}
	}
	if j.source != "" {
		fmt.Fprintf(&b, "kubelet's configuration: %s\n", j.source)
	}
	for _, s := range j.plan.Steps {
		fmt.Fprintf(&b, "step %s", s.ID)
		if s.Refused != "" {
			fmt.Fprintf(&b, " refused: %s", s.Refused)
		}
		b.WriteByte('\n')
		for _, c := range s.Commands {
			fmt.Fprintf(&b, "  $ %s\n", strings.Join(c.Argv, " "))
		}
		for _, f := range s.Files {
			fmt.Fprintf(&b, "  file %s\n", f.Path)
		}
		for _, u := range s.Units {
			fmt.Fprintf(&b, "  unit %s %s\n", u.Do, u.Unit)
		}
	}
	return b.String()
}

func unjoin(err error) []error {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		return joined.Unwrap()
	}
	if err != nil {
		return []error{err}
	}
	return nil
}

// document is docs/distributions.md.
func document(all []answers) string {
	return ""
}

var _ = finding.OK
