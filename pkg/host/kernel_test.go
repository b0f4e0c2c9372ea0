package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestLockHolder(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"lock": ""})
	name := filepath.Join(dir, "lock")
	h := openDir(t, dir)
	ctx := within(t, 10*time.Second)
	want := func(l Lock) {
		t.Helper()
		if got, err := h.LockHolder(ctx, "/lock"); got != l || err != nil {
			t.Errorf("LockHolder = %+v, %v; want %+v", got, err, l)
		}
	}
	want(Lock{})

	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	want(Lock{}) // another kind of lock: apt goes on beside it

	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	want(Lock{Held: true, PID: -1})
	f.Close()
	want(Lock{})

	p := helper(t, "lock "+name, nil)
	want(Lock{Held: true, PID: p.Pid})

	if _, err := h.LockHolder(ctx, "/absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	if _, err := h.LockHolder(ctx, "/"); !errors.Is(err, ErrNotRegular) {
		t.Errorf("directory: %v", err)
	}
}

func TestAdjtimex(t *testing.T) {
	tx, err := openDir(t, "/").Adjtimex(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if tx.State < 0 || tx.State > 5 || tx.MaxError < 0 || tx.MaxError > 17*time.Second || tx.Offset.Abs() > time.Second {
		t.Errorf("%+v", tx)
	}
}

func TestStatMount(t *testing.T) {
	h := openDir(t, "/")
	ctx := within(t, 10*time.Second)
	st, err := h.StatMount(ctx, "/proc")
	if err != nil || st.Dev.Minor == 0 || st.ReadOnly || !st.Pending.IsZero() {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := h.StatMount(ctx, "/no/such/mount"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	needsRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("ro", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if st, err := h.StatMount(ctx, dir); err != nil || !st.ReadOnly {
		t.Errorf("read-only mount: %+v, %v", st, err)
	}
}

func TestPTPOffset(t *testing.T) {
	at := func(ns int64) time.Time { return time.Unix(100, ns) }
	best := narrowest([]ptpReading{
		{at(0), at(900), at(1000)},
		{at(2000), at(1000), at(2100)}, // least disturbed
		{at(3000), at(3000), at(3500)},
	})
	if offset, width := best.offset(); offset != 1050 || width != 100 {
		t.Errorf("offset %v within %v, want 1.05µs within 100ns", offset, width)
	}
	h := openDir(t, "/")
	if _, _, err := h.PTPOffset(context.Background(), "/dev/zero"); err == nil || !strings.Contains(err.Error(), "not a PTP clock") {
		t.Errorf("another device: %v", err)
	}
	if _, _, err := h.PTPOffset(context.Background(), "/dev/ptp99"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

func TestKernelLog(t *testing.T) {
	needsRoot(t)
	h := openDir(t, "/")
	h.log.foreign = true
	ctx := within(t, 20*time.Second)
	say := func(text string) {
		t.Helper()
		if err := os.WriteFile("/dev/kmsg", []byte("<4>"+text+"\n"), 0); err != nil {
			t.Skipf("needs a kernel log that can be written: %v", err)
		}
	}
	marker := fmt.Sprintf("host-hygiene test %x", rand.Uint64())
	heard := func(records []KernelRecord, text string) (KernelRecord, bool) {
		i := slices.IndexFunc(records, func(r KernelRecord) bool { return r.Text == text })
		if i < 0 {
			return KernelRecord{}, false
		}
		return records[i], true
	}
	say(marker + " one")
	records, err := h.KernelLog(ctx)
	if err != nil {
		t.Fatal(err)
	}
	one, ok := heard(records, marker+" one")
	if !ok || one.Priority != 4 || one.Time == 0 || one.Sequence == 0 {
		t.Errorf("of %d records ours is %+v, %v", len(records), one, ok)
	}
	// The second call brings what is new behind what was.
	say(marker + " two")
	again, err := h.KernelLog(ctx)
	two, ok := heard(again, marker+" two")
	if err != nil || !ok || two.Sequence <= one.Sequence {
		t.Errorf("%+v, %v, %v", two, ok, err)
	}
	if len(again) <= len(records) || again[0] != records[0] {
		t.Error("the second answer does not go on with the first")
	}
	// What a process writes is not the kernel's word, also where it says so
	// (facility 0, as here).
	h = openDir(t, "/")
	records, err = h.KernelLog(ctx)
	if _, ok := heard(records, marker+" two"); ok || err != nil {
		t.Errorf("a process was taken for the kernel: %v", err)
	}
	records, err = readSyslog()
	if _, ok := heard(records, marker+" two"); ok || err != nil {
		t.Errorf("syslog(2): a process was taken for the kernel: %v", err)
	}
}

func TestKernelLogIsBounded(t *testing.T) {
	var l kernelLog
	text := strings.Repeat("x", 1000)
	for i := range 10000 {
		l.keep(KernelRecord{Sequence: uint64(i), Text: text})
	}
	if n := len(l.records); n == 0 || n > maxLog/1000 || l.records[n-1].Sequence != 9999 {
		t.Errorf("%d records are kept", n)
	}
	size := 0
	for i, r := range l.records {
		size += len(r.Text) + recordCost
		if i > 0 && r.Sequence != l.records[i-1].Sequence+1 {
			t.Fatal("a record is missing in between")
		}
	}
	if size != l.size {
		t.Errorf("accounted %d bytes, kept %d", l.size, size)
	}
}

// TestKernelLogIsTheDevice: a file or FIFO under the name is not read.
func TestKernelLogIsTheDevice(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"dev/kmsg": "6,1,1,-;forged\n"})
	h := openDir(t, dir)
	if err := h.log.follow(); err == nil || !strings.Contains(err.Error(), "/dev/kmsg") {
		t.Errorf("error = %v", err)
	}
}

func TestParseKernelRecord(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want KernelRecord
		bad  bool
	}{
		{in: "6,1234,567890123,-;oom-kill:constraint=CONSTRAINT_NONE,task=a b,c,pid=77,uid=0\n SUBSYSTEM=x\n",
			want: KernelRecord{Priority: 6, Sequence: 1234, Time: 567890123 * time.Microsecond, Text: "oom-kill:constraint=CONSTRAINT_NONE,task=a b,c,pid=77,uid=0"}},
		{in: "30,2,3,-,caller=T1;systemd[1]: a;b", want: KernelRecord{Priority: 6, Facility: 3, Sequence: 2, Time: 3 * time.Microsecond, Text: "systemd[1]: a;b"}},
		{in: "4,1,0,c;", want: KernelRecord{Priority: 4, Sequence: 1}},
		{in: "", bad: true}, {in: "6,1,2", bad: true}, {in: "6,1;x", bad: true}, {in: "x,1,2,-;t", bad: true},
		{in: "6,-1,2,-;t", bad: true}, {in: "6,1,-2,-;t", bad: true}, {in: "6,1,99999999999999999999,-;t", bad: true},
	} {
		got, err := ParseKernelRecord([]byte(tt.in))
		if (err != nil) != tt.bad || got != tt.want {
			t.Errorf("%q: %+v, %v", tt.in, got, err)
		}
	}
}

func FuzzParseKernelRecord(f *testing.F) {
	f.Add([]byte("6,339,5140900,-;NET: Registered PF_INET6 protocol family\n"))
	f.Add([]byte("30,1,2,-,caller=T1;x\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseKernelRecord(data)
		if err != nil {
			return
		}
		if r.Priority < 0 || r.Priority > 7 || r.Facility < 0 || r.Facility > 1<<13 || r.Time < 0 || strings.Contains(r.Text, "\n") {
			t.Errorf("%q gave %+v", data, r)
		}
	})
}

func TestParseSyslog(t *testing.T) {
	got := parseSyslog([]byte("<6>[    0.000000] Linux version 6.12\n" +
		"<3>[   12.345678] EXT4-fs error (device vdb): x\n" +
		"continued\n" +
		"<4>[   13.000001][    T7] with a caller\n" +
		"<30>[   14.000000] [T1] not a caller\n" +
		"<12>no time\n" +
		"<x>[ 1.5] odd\n"))
	want := []KernelRecord{
		{Priority: 6, Text: "Linux version 6.12"},
		{Priority: 3, Time: 12345678 * time.Microsecond, Text: "EXT4-fs error (device vdb): x"},
		{Priority: 3, Time: 12345678 * time.Microsecond, Text: "continued"},
		{Priority: 4, Time: 13000001 * time.Microsecond, Text: "with a caller"},
		{Priority: 6, Facility: 3, Time: 14 * time.Second, Text: "[T1] not a caller"},
		{Priority: 4, Facility: 1, Time: 14 * time.Second, Text: "no time"},
		{Priority: 4, Facility: 1, Time: 14 * time.Second, Text: "<x>[ 1.5] odd"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseSyslog(f *testing.F) {
	f.Add([]byte("<6>[    0.000000] Linux version 6.12\n<4>[   13.000001][    T7] x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, r := range parseSyslog(data) {
			if r.Priority < 0 || r.Priority > 7 || r.Time < 0 {
				t.Errorf("%q gave %+v", data, r)
			}
		}
	})
}
