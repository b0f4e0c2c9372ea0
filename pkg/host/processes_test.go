package host

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseProcStat(t *testing.T) {
	const tail = " S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 555 1 2 3\n"
	ok := func(comm string) Process {
		return Process{PID: 42, PPID: 7, Comm: comm, State: 'S', Threads: 3, StartTicks: 555}
	}
	kthread := Process{PID: 2, Comm: "kthreadd", State: 'S', Threads: 1, StartTicks: 1, Kernel: true}
	for _, tt := range []struct {
		in   string
		want Process
		err  string
	}{
		{in: "42 (bash)" + tail, want: ok("bash")},
		{in: "42 (a b) c" + "(d)" + tail, want: ok("a b) c(d")},
		{in: "42 ())" + tail, want: ok(")")},
		{in: "42 ()" + tail, want: ok("")},
		{in: "42 (new\nline)" + tail, want: ok("new\nline")},
		{in: "42 (\xff\x1b[31m)" + tail, want: ok("\xff\x1b[31m")},
		{in: "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 1", want: kthread},
		{in: "", err: "no (comm)"},
		{in: "(x)" + tail, err: "no (comm)"},
		{in: "42 )x(" + tail, err: "no (comm)"},
		{in: "x (y)" + tail, err: "no number"},
		{in: "42 (bash) S 7 1", err: "5 fields, want at least 22"},
		{in: "42 (bash) SS 7", err: "no letter"},
		{in: strings.Replace("42 (bash)"+tail, " 7 ", " -7 ", 1), err: "field 4"},
		{in: strings.Replace("42 (bash)"+tail, "555", "99999999999999999999", 1), err: "field 22"},
	} {
		got, err := parseProcStat([]byte(tt.in), map[string]string{})
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want an error with %q", tt.in, err, tt.err)
			}
			continue
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
			t.Errorf("%q: %v\n%s", tt.in, err, diff)
		}
	}
}

func FuzzParseProcStat(f *testing.F) {
	f.Add([]byte("1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n"))
	f.Add([]byte("7 (a) b (c)) R 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		// Whatever a process is called, what stands behind the name is the kernel's.
		named, err := parseProcStat([]byte("7 ("+string(data)+") R 3 1 1 0 -1 64 0 0 0 0 0 0 0 0 20 0 5 0 15 0 0 0\n"), nil)
		if err != nil || named != (Process{PID: 7, PPID: 3, Comm: string(data), State: 'R', Threads: 5, StartTicks: 15}) {
			t.Errorf("called %q: %+v, %v", data, named, err)
		}
		p, err := parseProcStat(data, nil)
		if err != nil {
			return
		}
		if p.PID < 0 || p.PPID < 0 || p.Threads < 0 || !strings.Contains(string(data), "("+p.Comm+")") {
			t.Errorf("%q gave %+v", data, p)
		}
	})
}

func TestProcessesOfThisMachine(t *testing.T) {
	h := openDir(t, "/")
	procs, err := h.Processes(context.Background())
	if err != nil && os.Geteuid() == 0 {
		t.Fatal(err)
	}
	found := false
	for i, p := range procs {
		if i > 0 && procs[i-1].PID >= p.PID {
			t.Fatalf("PID %d stands behind %d", p.PID, procs[i-1].PID)
		}
		if p.PID == os.Getpid() {
			found = true
			if p.PPID != os.Getppid() || p.Threads < 1 || p.Kernel || !strings.HasPrefix("host.test", p.Comm) {
				t.Errorf("we are %+v", p)
			}
		}
	}
	if !found {
		t.Errorf("%d processes, and we are not among them", len(procs))
	}
	again, _ := h.Processes(context.Background())
	if len(procs) == 0 || len(again) == 0 || &again[0] != &procs[0] {
		t.Error("the second probe of a pass read the table again")
	}
}

func TestProcessesOfATree(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{
		"proc/9/stat":    "9 (nine) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
		"proc/10/stat":   "10 (ten) Z 9 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 16 0 0 0\n",
		"proc/11/status": "ended before its stat could be copied\n",
		"proc/uptime":    "1 1\n",
	})
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	procs, err := tree.Processes(context.Background())
	if err != nil || len(procs) != 2 || procs[0].Comm != "nine" || procs[1].Comm != "ten" {
		t.Errorf("%+v, %v", procs, err)
	}
	writeTree(t, dir, map[string]string{"proc/12/stat": "12 (cut off"})
	if _, _, err := tree.Root.readProcesses(nil, nil, 0); err == nil || !strings.Contains(err.Error(), "/proc/12/stat") {
		t.Errorf("truncated file: %v", err)
	}
}
