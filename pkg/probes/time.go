package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// Time checks.
type Time struct {
	Common
}

// DefaultTime returns the default settings.
func DefaultTime() Time { return Time{} }

// Name implements [Probe].
func (Time) Name() string { return "time" }

// Condition implements [Probe].
func (Time) Condition() string { return ConditionPrefix + "TimeProblem" }

// Rules implements [Probe].
func (Time) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p Time) Validate() error { return nil }

// Check implements [Probe].
func (p Time) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
