package host

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"
)

// started is a process of this test: a shell that becomes another program when a
// line is written to it.
func started(t *testing.T) (pid int, becomes func()) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "read line; exec sleep 600")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid, func() {
		t.Helper()
		io.WriteString(in, "go\n")
		for range 1000 {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid)); string(comm) == "sleep\n" {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Fatal("it did not become another program")
	}
}

// tableReader reads the process table of this machine, pass by pass.
type tableReader struct {
	t     *testing.T
	r     *Root
	table processTable
}

func newTableReader(t *testing.T, boot func() time.Duration) *tableReader {
	return &tableReader{t: t, r: openDir(t, "/").Root, table: processTable{boot: boot}}
}

func (tr *tableReader) next() (procs []Process, opened int64) {
	tr.t.Helper()
	before := tr.r.Opened()
	procs, err := tr.table.read(AsOf(context.Background(), time.Now()), tr.r)
	if err != nil {
		tr.t.Fatal(err)
	}
	return procs, tr.r.Opened() - before
}

func comm(procs []Process, pid int) string {
	i := slices.IndexFunc(procs, func(p Process) bool { return p.PID == pid })
	if i < 0 {
		return ""
	}
	return procs[i].Comm
}

func TestYoungProcessIsReadInEveryPass(t *testing.T) {
	tr := newTableReader(t, nil)
	pid, becomes := started(t)
	if procs, _ := tr.next(); comm(procs, pid) != "sh" {
		t.Fatalf("%q, want sh", comm(procs, pid))
	}
	becomes()
	if procs, _ := tr.next(); comm(procs, pid) != "sleep" {
		t.Errorf("%q, want sleep", comm(procs, pid))
	}
}

func TestOldProcessIsReadAgainInTime(t *testing.T) {
	// All processes are an hour older than they are.
	var passed time.Duration
	var clock processTable
	tr := newTableReader(t, func() time.Duration { return clock.sinceBoot() + time.Hour + passed })
	pid, becomes := started(t)
	all, first := tr.next()
	becomes()
	procs, next := tr.next()
	if comm(procs, pid) != "sh" {
		t.Errorf("%q: it was read again at once", comm(procs, pid))
	}
	// Others of this machine come and go meanwhile.
	if first < int64(len(all)) || next > first/2 {
		t.Errorf("%d files were opened for %d processes, then %d", first, len(all), next)
	}
	now, err := tr.table.readNow(context.Background(), tr.r, []int{pid, 1 << 30})
	if err != nil || len(now) != 1 || now[0].Comm != "sleep" {
		t.Errorf("asked for it: %+v, %v", now, err)
	}
	passed += 2 * rereadAfter
	if procs, _ := tr.next(); comm(procs, pid) != "sleep" {
		t.Errorf("%q ten minutes later, want sleep", comm(procs, pid))
	}

	pid, becomes = started(t)
	tr.next()
	becomes()
	if procs, err := tr.table.readNow(context.Background(), tr.r, nil); err != nil || comm(procs, pid) != "sleep" {
		t.Errorf("all anew: %q, %v", comm(procs, pid), err)
	}
}

func TestEndedProcessLeavesTheTable(t *testing.T) {
	tr := newTableReader(t, func() time.Duration { return 1000 * time.Hour })
	cmd := exec.Command("/bin/sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	procs, _ := tr.next()
	there := comm(procs, pid) != ""
	cmd.Process.Kill()
	cmd.Wait()
	if procs, _ := tr.next(); !there || comm(procs, pid) != "" {
		t.Errorf("there %v, and then still: %q", there, comm(procs, pid))
	}
}

// TestReusedPIDIsAnotherProcess has the kernel give a PID a second time.
func TestReusedPIDIsAnotherProcess(t *testing.T) {
	const last = "/proc/sys/kernel/ns_last_pid"
	tr := newTableReader(t, func() time.Duration { return 1000 * time.Hour })
	for range 20 {
		first := exec.Command("/bin/sleep", "600")
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		pid := first.Process.Pid
		procs, _ := tr.next()
		was := comm(procs, pid)
		first.Process.Kill()
		first.Wait()
		if err := os.WriteFile(last, []byte(fmt.Sprint(pid-1)), 0); err != nil {
			t.Skipf("the next PID can not be chosen here: %v", err)
		}
		second := exec.Command("/bin/cat")
		in, err := second.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := second.Start(); err != nil {
			t.Fatal(err)
		}
		again := second.Process.Pid == pid
		procs, _ = tr.next()
		is := comm(procs, pid)
		in.Close()
		second.Wait()
		if again {
			if was != "sleep" || is != "cat" {
				t.Errorf("PID %d was %q and is %q, want sleep and cat", pid, was, is)
			}
			return
		}
	}
	t.Skip("others took the PID each time")
}

func TestChangedFilesOfATreeAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	const tail = " S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n"
	writeTree(t, dir, map[string]string{"proc/9/stat": "9 (nine)" + tail, "proc/10/stat": "10 (ten)" + tail})
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	read := func() (procs []Process, opened int64) {
		t.Helper()
		before := tree.Opened()
		procs, err := tree.Processes(AsOf(context.Background(), time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		return procs, tree.Opened() - before
	}
	if _, opened := read(); opened != 3 { // with /proc
		t.Errorf("first: %d files", opened)
	}
	if procs, opened := read(); opened != 1 || comm(procs, 10) != "ten" {
		t.Errorf("unchanged: %d files, %+v", opened, procs)
	}
	writeTree(t, dir, map[string]string{"proc/10/stat": "10 (other)" + tail})
	if procs, opened := read(); opened != 2 || comm(procs, 10) != "other" || comm(procs, 9) != "nine" {
		t.Errorf("changed: %d files, %+v", opened, procs)
	}
}

// TestProcessesComeAndGo: a table that is read while processes are started and end
// by the thousand is in order, has each once, and knows our own.
func TestProcessesComeAndGo(t *testing.T) {
	stop := make(chan struct{})
	var forking sync.WaitGroup
	for range 2 {
		forking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					exec.Command("/bin/true").Run()
				}
			}
		})
	}
	h := openDir(t, "/")
	for range 40 {
		procs, err := h.ProcessesNow(t.Context())
		if err != nil {
			t.Error(err)
		}
		inOrder := func(a, b Process) int { return cmp.Compare(a.PID, b.PID) }
		if !slices.IsSortedFunc(procs, inOrder) || len(slices.CompactFunc(slices.Clone(procs), func(a, b Process) bool { return a.PID == b.PID })) != len(procs) {
			t.Error("the table is not in order")
		}
		if i, ok := slices.BinarySearchFunc(procs, Process{PID: os.Getpid()}, inOrder); !ok || procs[i].PPID != os.Getppid() {
			t.Error("our own process is not in the table")
		}
	}
	close(stop)
	forking.Wait()
}

// TestProcessNamesItself: a name that looks like the fields behind it.
func TestProcessNamesItself(t *testing.T) {
	const name = ") R 0 9 (\n1 (\x1b"
	child := exec.Command("/bin/sh", "-c", `printf '%s' "$1" >/proc/$$/comm; echo named; read x`, "sh", name)
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); child.Wait() }()
	if _, err := io.ReadFull(out, make([]byte, len("named\n"))); err != nil {
		t.Fatal(err)
	}
	got, err := openDir(t, "/").ProcessesNow(t.Context(), child.Process.Pid)
	if err != nil || len(got) != 1 || got[0].Comm != name || got[0].PPID != os.Getpid() || got[0].Kernel {
		t.Errorf("%+v, %v", got, err)
	}
}
