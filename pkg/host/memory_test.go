package host

import (
	"testing"

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
