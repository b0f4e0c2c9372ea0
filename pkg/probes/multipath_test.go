package probes

import "testing"

func TestMultipath(t *testing.T) { runCases(t, "multipath", DefaultMultipath) }
