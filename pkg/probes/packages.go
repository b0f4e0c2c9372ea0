package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// Packages checks.
type Packages struct {
	Common
}

// DefaultPackages returns the default settings.
func DefaultPackages() Packages { return Packages{} }

// Name implements [Probe].
func (Packages) Name() string { return "packages" }

// Condition implements [Probe].
func (Packages) Condition() string { return ConditionPrefix + "PackageProblem" }

// Rules implements [Probe].
func (Packages) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p Packages) Validate() error { return nil }

// Check implements [Probe].
func (p Packages) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
