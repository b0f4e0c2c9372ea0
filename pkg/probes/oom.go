package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// OOM checks.
type OOM struct {
	Common
}

// DefaultOOM returns the default settings.
func DefaultOOM() OOM { return OOM{} }

// Name implements [Probe].
func (OOM) Name() string { return "oom" }

// Condition implements [Probe].
func (OOM) Condition() string { return ConditionPrefix + "OOMProblem" }

// Rules implements [Probe].
func (OOM) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p OOM) Validate() error { return nil }

// Check implements [Probe].
func (p OOM) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
