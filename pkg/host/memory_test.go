package host

import (
	"runtime/debug"
	"slices"
	"testing"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

func TestSmallPages(t *testing.T) {
	if err := SmallPages(); err != nil {
		t.Fatal(err)
	}
	off, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
	if err != nil || off != 1 {
		t.Errorf("PR_GET_THP_DISABLE = %d, %v", off, err)
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// The race detector's program is not static, and stays as it is.
func TestUnmapProgram(t *testing.T) {
	resident := func() uint64 {
		t.Helper()
		self, err := procfs.Self()
		if err != nil {
			t.Fatal(err)
		}
		status, err := self.NewStatus()
		if err != nil {
			t.Fatal(err)
		}
		return status.RssFile
	}
	before := resident()
	if err := UnmapProgram(); err != nil {
		t.Fatal(err)
	}
	after := resident()
	info, _ := debug.ReadBuildInfo()
	static := slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "0"})
	if gone := before - after; static && (after > before || gone < 1<<20) {
		t.Errorf("resident of files %d before, %d after", before, after)
	}
}
