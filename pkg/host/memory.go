package host

import (
	"fmt"
	"os"
	"runtime/debug"
	"slices"

	"github.com/prometheus/procfs"
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

// UnmapProgram takes the pages of this process's own program, code and constants,
// out of its memory: two thirds of what an agent is resident with, most of them
// needed for its start only. What is needed again comes back from the page cache,
// 16 pages at a time, without a read from the disk as long as that has it.
// madvise(2), MADV_DONTNEED.
//
// It does nothing to a program that is not a static executable: the loader of
// another one has written into its constants (relocations), which would be lost.
func UnmapProgram() error {
	info, ok := debug.ReadBuildInfo()
	if !ok || !slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "0"}) ||
		!slices.Contains(info.Settings, debug.BuildSetting{Key: "-buildmode", Value: "exe"}) {
		return nil
	}
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	self, err := procfs.Self()
	if err != nil {
		return err
	}
	maps, err := self.ProcMaps()
	if err != nil {
		return fmt.Errorf("/proc/self/maps: %w", err)
	}
	for _, m := range maps {
		if m.Pathname != program || m.Perms.Write || m.Perms.Shared {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.StartAddr, m.EndAddr-m.StartAddr, unix.MADV_DONTNEED); errno != 0 {
			return os.NewSyscallError("madvise", errno)
		}
	}
	return nil
}
