package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// Disks checks.
type Disks struct {
	Common
}

// DefaultDisks returns the default settings.
func DefaultDisks() Disks { return Disks{} }

// Name implements [Probe].
func (Disks) Name() string { return "disks" }

// Condition implements [Probe].
func (Disks) Condition() string { return ConditionPrefix + "DiskProblem" }

// Rules implements [Probe].
func (Disks) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p Disks) Validate() error { return nil }

// Check implements [Probe].
func (p Disks) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
