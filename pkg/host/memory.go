package host

import (
	"os"

	"golang.org/x/sys/unix"
)

// SmallPages keeps the kernel from giving this process huge pages where it does
// so unasked (/sys/kernel/mm/transparent_hugepage/enabled is "always" on Debian
// and Ubuntu): they make a heap of a few megabytes half as large again, minutes
// or hours after the start, which looks like a leak. Pages that are huge already
// stay so. PR_SET_THP_DISABLE(2const), since Linux 3.15.
func SmallPages() error {
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0))
}
