package main

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// timerLag is by how much a timer of this process may be late.
const timerLag = 50 * time.Millisecond

// lagTimers lets the kernel put this process's timers together with others that
// are due about then. Go's runtime has a thread that looks every 20 to 100 µs, as
// long as anything runs, whether somebody is stuck in a system call (runtime,
// sysmon): four fifths of an idle agent's wake-ups, and a third of its processor
// time. Threads made later take it over from those that make them (prctl(2),
// PR_SET_TIMERSLACK); it needs CAP_SYS_NICE, and nothing is lost without.
func lagTimers() {
	want := strconv.FormatInt(timerLag.Nanoseconds(), 10)
	// Again, because a thread may make another before it is its turn.
	for again, n := true, 0; again && n < 5; n++ {
		again = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return
		}
		for _, t := range tasks {
			// By the thread's own number, for the entry is not below task/.
			file := "/proc/" + t.Name() + "/timerslack_ns"
			if now, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(now)) != want {
				again = os.WriteFile(file, []byte(want), 0) == nil || again
			}
		}
	}
}
