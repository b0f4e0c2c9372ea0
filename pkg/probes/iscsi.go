package probes

import (
	"context"
	"errors"

	"github.com/hosthygiene/agent/pkg/finding"
)

// ISCSI checks.
type ISCSI struct {
	Common
}

// DefaultISCSI returns the default settings.
func DefaultISCSI() ISCSI { return ISCSI{} }

// Name implements [Probe].
func (ISCSI) Name() string { return "iscsi" }

// Condition implements [Probe].
func (ISCSI) Condition() string { return ConditionPrefix + "ISCSIProblem" }

// Rules implements [Probe].
func (ISCSI) Rules() []finding.Rule { return nil }

// Validate implements [Probe].
func (p ISCSI) Validate() error { return nil }

// Check implements [Probe].
func (p ISCSI) Check(ctx context.Context, in Input) (finding.Result, error) {
	return finding.Result{}, errors.New("this probe is being written")
}
