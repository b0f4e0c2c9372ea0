package main

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

func TestLagTimers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	lagTimers()
	done := make(chan struct{})
	go func() { close(done) }()
	<-done
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		data, err := os.ReadFile("/proc/" + task.Name() + "/timerslack_ns")
		if err == nil && strings.TrimSpace(string(data)) != strconv.FormatInt(timerLag.Nanoseconds(), 10) {
			t.Errorf("thread %s: %s", task.Name(), data)
		}
	}
}
