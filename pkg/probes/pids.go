package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// PIDs checks.
type PIDs struct {
	Common
}

// DefaultPIDs returns the default settings.
func DefaultPIDs() PIDs { return PIDs{} }

// Name implements [Probe].
func (PIDs) Name() string { return "pids" }

// Condition implements [Probe].
func (PIDs) Condition() string { return ConditionPrefix + "PIDProblem" }

// Rules implements [Probe].
func (PIDs) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p PIDs) Validate() error { return nil }

// Check implements [Probe].
func (p PIDs) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
