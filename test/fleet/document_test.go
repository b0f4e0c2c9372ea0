package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for share, want := range map[float64]time.Duration{0: 1, 0.5: 50, 0.95: 95, 0.99: 99, 1: 100} {
		if got := percentile(hundred, share); got != want {
			t.Errorf("%v of 1..100: %d, want %d", share, got, want)
		}
	}
	if got := percentile(nil, 0.5); got != 0 {
		t.Errorf("of none: %v", got)
	}
	if got := percentile([]time.Duration{7}, 0.99); got != 7 {
		t.Errorf("of one: %v", got)
	}
}

func TestMetrics(t *testing.T) {
	text := []byte("# TYPE a gauge\na 1.5e+06\na_total 3\nb{x=\"1\"} 4\n")
	got, err := metrics(text, "a_total", "a")
	if err != nil || !slices.Equal(got, []float64{3, 1.5e6}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := metrics(text, "b"); err == nil {
		t.Error("a metric with labels was taken for one without")
	}
}

func TestOwnProcessIsMeasured(t *testing.T) {
	if rss, err := resident(os.Getpid()); err != nil || rss < 1<<20 {
		t.Errorf("resident: %d, %v", rss, err)
	}
	before, err := processorTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	after := before
	for i := 0; after < before+30*time.Millisecond; i++ {
		if after, err = processorTime(os.Getpid()); err != nil || i == 1e7 {
			t.Fatalf("ten million readings used %s: %v", after-before, err)
		}
	}
}

func TestSection(t *testing.T) {
	file := filepath.Join(t.TempDir(), "doc.md")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("above\n" + sectionBegin + "old\n" + sectionEnd + "below\n")
	for range 2 {
		if err := replaceSection(file, "new\n"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if want := "above\n" + sectionBegin + "new\n" + sectionEnd + "below\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	write("above\n" + sectionBegin + "never ended\n")
	if err := replaceSection(file, "new\n"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a section without an end: %v", err)
	}
}

func TestTheDocumentHasASection(t *testing.T) {
	if _, err := section(filepath.Join("..", "..", "docs", "performance.md")); err != nil {
		t.Error(err)
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := thousands(n); got != want {
			t.Errorf("%d: %s", n, got)
		}
	}
}
