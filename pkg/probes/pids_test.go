package probes

import "testing"

func TestPIDs(t *testing.T) { runCases(t, "pids", DefaultPIDs) }
