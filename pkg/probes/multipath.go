package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// Multipath checks.
type Multipath struct {
	Common
}

// DefaultMultipath returns the default settings.
func DefaultMultipath() Multipath { return Multipath{} }

// Name implements [Probe].
func (Multipath) Name() string { return "multipath" }

// Condition implements [Probe].
func (Multipath) Condition() string { return ConditionPrefix + "MultipathProblem" }

// Rules implements [Probe].
func (Multipath) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p Multipath) Validate() error { return nil }

// Check implements [Probe].
func (p Multipath) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
