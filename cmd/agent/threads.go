package main

import (
	"runtime"
	"sync"
)

// Where a node has no PID left, the kernel refuses this process new threads, and
// Go's runtime ends a program that is refused one (runtime/os_linux.go,
// newosproc): the agent would die of what it is there to tell, and its container
// not start again, for that takes PIDs too. So it needs none later.
const (
	// maxParallel is on how many processors it computes at a time. By default
	// they would be all, and the runtime would make a thread for each when there
	// is work for it.
	maxParallel = 4
	// spareThreads are for calls into the kernel that take long: a probe's reads
	// of a slow disk, commands, what hangs. A parked one costs 16 KiB of kernel
	// stack and as much of its own.
	spareThreads = 12
)

// reserveThreads makes the threads that the process may need, and leaves them to
// the runtime, which keeps those that have nothing to do.
func reserveThreads(parallel, spare int) {
	runtime.GOMAXPROCS(min(runtime.GOMAXPROCS(0), parallel))
	var pinned, unpinned sync.WaitGroup
	release := make(chan struct{})
	for range runtime.GOMAXPROCS(0) + spare {
		pinned.Add(1)
		unpinned.Go(func() {
			// Each thread is held until all are, so that no two share one.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			pinned.Done()
			<-release
		})
	}
	pinned.Wait()
	close(release)
	unpinned.Wait()
}

// settle leaves the process one processor to compute on, once what it does at its
// start is done: a pass is little work in many steps, and with two each step that
// another goroutine goes on with wakes a thread on the other processor, which
// looks for more and finds none. A goroutine that stays in the kernel gives the
// processor up after some 50 ms (see lagTimers), so that nothing waits for it.
func settle() { runtime.GOMAXPROCS(1) }
