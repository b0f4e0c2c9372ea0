package host

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// fakeDM answers as drivers/md/dm-ioctl.c does.
type fakeDM struct {
	devices []DMDevice
	calls   int
	// reload is called before each status, to change a table in between.
	reload func()
}

func (f *fakeDM) call(request uint, buf []byte) error {
	f.calls++
	ne := binary.NativeEndian
	if ne.Uint32(buf) != 4 || ne.Uint32(buf[12:]) != uint32(len(buf)) || ne.Uint32(buf[16:]) != dmHeader {
		return unix.EINVAL
	}
	flags, dev := ne.Uint32(buf[28:]), ne.Uint64(buf[40:])
	if flags&dmNoFlush == 0 {
		return errors.New("this request would flush")
	}
	finish := func(data []byte) error {
		if len(data) > len(buf)-dmHeader {
			ne.PutUint32(buf[28:], flags|dmBufferFull)
			ne.PutUint32(buf[12:], uint32(len(buf)))
			return nil
		}
		ne.PutUint32(buf[12:], uint32(dmHeader+len(data)))
		copy(buf[dmHeader:], data)
		return nil
	}
	switch request {
	case dmListDevices:
		var data []byte
		for i, d := range f.devices {
			entry := ne.AppendUint64(nil, unix.Mkdev(d.Dev.Major, d.Dev.Minor))
			entry = append(ne.AppendUint32(entry, 0), d.Name+"\x00"...)
			for len(entry)%8 != 0 {
				entry = append(entry, 0)
			}
			entry = ne.AppendUint32(ne.AppendUint32(entry, d.EventNr), 0) // event_nr, flags
			if i < len(f.devices)-1 {
				ne.PutUint32(entry[8:], uint32(len(entry)))
			}
			data = append(data, entry...)
		}
		return finish(data)
	case dmTableStatus:
		if f.reload != nil && flags&dmStatusTable == 0 {
			f.reload()
		}
		for _, d := range f.devices {
			if unix.Mkdev(d.Dev.Major, d.Dev.Minor) != dev {
				continue
			}
			out := flags
			if d.Suspended {
				out |= dmSuspended
			}
			if d.ReadOnly {
				out |= dmReadOnly
			}
			ne.PutUint32(buf[20:], uint32(len(d.Targets)))
			ne.PutUint32(buf[24:], uint32(d.OpenCount))
			ne.PutUint32(buf[32:], d.EventNr)
			copy(buf[48:176], d.Name)
			copy(buf[176:305], d.UUID)
			var data []byte
			for _, t := range d.Targets {
				text := t.Status
				if flags&dmStatusTable != 0 {
					text = t.Table
				}
				spec := ne.AppendUint64(ne.AppendUint64(nil, t.Start), t.Length)
				spec = ne.AppendUint32(ne.AppendUint32(spec, 0), 0)
				name := make([]byte, 16)
				copy(name, t.Type)
				spec = append(append(spec, name...), text+"\x00"...)
				for (len(data)+len(spec))%8 != 0 {
					spec = append(spec, 0)
				}
				ne.PutUint32(spec[20:], uint32(len(data)+len(spec)))
				data = append(data, spec...)
			}
			if len(d.Targets) == 0 { // as the kernel leaves it: no data at all
				ne.PutUint32(buf[12:], 305)
				ne.PutUint32(buf[28:], out)
				return nil
			}
			err := finish(data)
			ne.PutUint32(buf[28:], ne.Uint32(buf[28:])|out)
			return err
		}
		return unix.ENXIO
	}
	return unix.ENOTTY
}

func multipathDevice(minor uint32) DMDevice {
	return DMDevice{
		Name: fmt.Sprintf("mpath%d", minor), UUID: fmt.Sprintf("mpath-3600%d", minor), Dev: DevNum{253, minor}, OpenCount: 1, EventNr: 4,
		Targets: []DMTarget{{Length: 2097152, Type: "multipath",
			Table:  "1 queue_if_no_path 0 2 1 service-time 0 1 2 8:16 1 1 service-time 0 1 2 8:32 1 1",
			Status: "2 0 0 0 2 1 A 0 1 2 8:16 A 0 0 1 E 0 1 2 8:32 F 3 0 1"}},
	}
}

func TestListDevices(t *testing.T) {
	f := &fakeDM{devices: []DMDevice{
		multipathDevice(0),
		{Name: "vg-root", UUID: "LVM-x", Dev: DevNum{253, 300}, ReadOnly: true, Targets: []DMTarget{
			{Length: 100, Type: "linear", Table: "8:3 2048"},
			{Start: 100, Length: 50, Type: "striped", Table: "2 128 8:3 0 8:4 0", Status: "2 8:3 8:4 1 AA"},
		}},
		{Name: "empty", UUID: "", Dev: DevNum{253, 2}, Suspended: true},
		{Name: strings.Repeat("n", 127), UUID: strings.Repeat("u", 128), Dev: DevNum{4095, 1<<20 - 1}, Targets: []DMTarget{{Length: 1, Type: "error"}}},
		// A table of a thousand paths does not fit into the first buffer.
		{Name: "wide", Dev: DevNum{253, 4}, Targets: []DMTarget{{Length: 1, Type: "multipath", Table: strings.Repeat("8:16 ", 30000), Status: "s"}}},
		multipathDevice(5),
	}}
	got, err := listDevices(f.call)
	if diff := cmp.Diff(f.devices, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
}

func TestListNoDevices(t *testing.T) {
	f := &fakeDM{}
	if got, err := listDevices(f.call); len(got) != 0 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestDeviceThatGoesAway(t *testing.T) {
	f := &fakeDM{devices: []DMDevice{multipathDevice(0), multipathDevice(1)}}
	f.reload = func() { f.devices = f.devices[:1] }
	got, err := listDevices(f.call)
	if err != nil || len(got) != 1 || got[0].Name != "mpath0" {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestTableChangesInBetween: a status never stands beside the table of another
// target.
func TestTableChangesInBetween(t *testing.T) {
	f := &fakeDM{devices: []DMDevice{multipathDevice(0)}}
	changes := 1
	f.reload = func() {
		if changes > 0 {
			changes--
			f.devices[0].Targets = []DMTarget{{Length: 8, Type: "linear", Table: "8:3 0"}}
		}
	}
	got, err := listDevices(f.call)
	if diff := cmp.Diff(f.devices, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	length := uint64(1)
	f.reload = func() { length++; f.devices[0].Targets = []DMTarget{{Length: length, Type: "linear"}} }
	if _, err := listDevices(f.call); err == nil || !strings.Contains(err.Error(), "253:0") {
		t.Errorf("a table that never rests: %v", err)
	}
}

func TestBufferHasALimit(t *testing.T) {
	calls := 0
	_, err := listDevices(func(_ uint, buf []byte) error {
		calls++
		binary.NativeEndian.PutUint32(buf[28:], dmBufferFull)
		return nil
	})
	if !errors.Is(err, ErrTooLarge) || calls > 10 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

func TestDeviceMapperAbsent(t *testing.T) {
	dir := t.TempDir()
	// The name alone is a module waiting to be loaded by who opens it.
	writeTree(t, dir, map[string]string{"proc/misc": "229 fuse\n235 autofs\n", "dev/mapper/control": ""})
	h := openDir(t, dir)
	if got, err := h.DeviceMapper(context.Background()); got != nil || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	writeTree(t, dir, map[string]string{"proc/misc": "229 fuse\n236 device-mapper\n"})
	if _, err := h.DeviceMapper(context.Background()); err == nil || !strings.Contains(err.Error(), "control node") {
		t.Errorf("a file in place of the node: %v", err)
	}
}

// kernelReply is an answer of Linux 6.12 (device-mapper 4.48.0) on a node with one
// multipath map of two paths.
func kernelReply(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/dm/" + name + ".hex")
	if err != nil {
		t.Fatal(err)
	}
	data, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestKernelReplies(t *testing.T) {
	numbers, err := parseDMList(kernelReply(t, "list"))
	if diff := cmp.Diff([]uint64{unix.Mkdev(253, 0)}, numbers); diff != "" || err != nil {
		t.Errorf("list: %v\n%s", err, diff)
	}
	want := DMDevice{Name: "mpatha", UUID: "mpath-35000c500a1b2c3d4", Dev: DevNum{253, 0}, EventNr: 4, Targets: []DMTarget{
		{Length: 131072, Type: "multipath", Table: "0 0 2 1 service-time 0 1 2 8:0 1 1 service-time 0 1 2 8:16 1 1 "}}}
	got, err := parseDMDevice(kernelReply(t, "table"), true)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("table: %v\n%s", err, diff)
	}
	want.Targets[0].Table, want.Targets[0].Status = "", "2 1 0 0 2 1 E 0 1 2 8:0 A 0 0 1 E 0 1 2 8:16 A 0 0 1 "
	got, err = parseDMDevice(kernelReply(t, "status"), false)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("status: %v\n%s", err, diff)
	}
}

func FuzzParseDM(f *testing.F) {
	for _, name := range []string{"list", "table", "status"} {
		f.Add(kernelReply(f, name))
	}
	f.Add([]byte{})
	far := slices.Clone(kernelReply(f, "list"))
	binary.NativeEndian.PutUint32(far[dmHeader+8:], 1<<30) // the next device
	f.Add(far)
	f.Fuzz(func(t *testing.T, data []byte) {
		if numbers, err := parseDMList(data); err == nil && len(numbers)*12 > len(data) {
			t.Errorf("%d devices in %d bytes", len(numbers), len(data))
		}
		d, err := parseDMDevice(data, true)
		if err == nil && len(d.Targets)*dmTarget > len(data) {
			t.Errorf("%d targets in %d bytes", len(d.Targets), len(data))
		}
	})
}

func BenchmarkListDevices(b *testing.B) {
	f := &fakeDM{}
	for i := range 500 {
		f.devices = append(f.devices, multipathDevice(uint32(i)))
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := listDevices(f.call); err != nil {
			b.Fatal(err)
		}
	}
}
