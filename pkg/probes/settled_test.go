package probes

import (
	"fmt"
	"testing"
	"time"
)

func TestSettled(t *testing.T) {
	m, now := NewMemory(), time.Unix(1_800_000_000, 0)
	s := settledIn(m, "x", now)
	sum := s.sum(0, "link", "size")
	if s.is("disk", sum) {
		t.Error("what was never looked at is settled")
	}
	s.remember("disk", sum, now)
	s = settledIn(m, "x", now.Add(settledFor-time.Second))
	if !s.is("disk", sum) {
		t.Error("forgotten before its time")
	}
	if s.is("disk", s.sum(0, "link", "other size")) || s.is("disk", s.sum(0, "size", "link")) || s.is("other", sum) {
		t.Error("settled under other facts")
	}
	if settledIn(m, "y", now).is("disk", sum) {
		t.Error("remembered under another name")
	}
	if settledIn(m, "x", now.Add(2*settledFor)).is("disk", sum) {
		t.Error("remembered for longer than ten minutes")
	}
	s.remember("disk", sum, now)
	if settledIn(m, "x", now.Add(-time.Hour)).is("disk", sum) {
		t.Error("remembered beyond a clock that was set back")
	}
	if n := len(settledIn(m, "x", now).seen); n != 0 {
		t.Errorf("%d things that are over are still kept", n)
	}
}

// TestSettledSpread: what was remembered in one pass must not end in one pass.
func TestSettledSpread(t *testing.T) {
	m, now := NewMemory(), time.Unix(1_800_000_000, 0)
	s := settledIn(m, "x", now)
	const n = 1000
	for i := range n {
		name := fmt.Sprint(i)
		s.remember(name, s.sum(0, name), now)
	}
	before := n
	for minute := 6; minute <= 10; minute++ {
		left := len(settledIn(m, "x", now.Add(time.Duration(minute)*time.Minute)).seen)
		if ended := before - left; ended > n/3 {
			t.Errorf("%d of %d end in minute %d", ended, n, minute)
		}
		before = left
	}
	if before != 0 {
		t.Errorf("%d are kept for longer than ten minutes", before)
	}
}
