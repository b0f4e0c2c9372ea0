package probes

import "testing"

func TestDisks(t *testing.T) { runCases(t, "disks", DefaultDisks) }
