package probes

import "testing"

func TestOOM(t *testing.T) { runCases(t, "oom", DefaultOOM) }
