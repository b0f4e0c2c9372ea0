package main

import (
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestReserveThreads(t *testing.T) {
	procs := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(procs)
	threads := func() int {
		t.Helper()
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	const spare = 24
	reserveThreads(2, spare)
	if n := runtime.GOMAXPROCS(0); n > 2 {
		t.Errorf("GOMAXPROCS is %d", n)
	}
	before := threads()
	if before < spare {
		t.Fatalf("%d threads, want %d or more", before, spare)
	}
	// Calls that block, each on a thread of its own, take none besides.
	var blocked sync.WaitGroup
	var pipe [2]int
	if err := syscall.Pipe(pipe[:]); err != nil {
		t.Fatal(err)
	}
	for range spare - 4 {
		blocked.Go(func() {
			var b [1]byte
			syscall.Read(pipe[0], b[:]) // until the pipe ends
		})
	}
	deadline := time.Now().Add(10 * time.Second)
	for stuck := 0; stuck < spare-4; {
		if time.Now().After(deadline) {
			t.Fatalf("%d calls block, want %d", stuck, spare-4)
		}
		stuck = 0
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			data, err := os.ReadFile("/proc/self/task/" + task.Name() + "/wchan")
			if err == nil && (string(data) == "pipe_read" || string(data) == "anon_pipe_read") {
				stuck++
			}
		}
		runtime.Gosched()
	}
	if after := threads(); after > before {
		t.Errorf("%d threads, then %d", before, after)
	}
	syscall.Close(pipe[1])
	blocked.Wait()
	syscall.Close(pipe[0])
}
