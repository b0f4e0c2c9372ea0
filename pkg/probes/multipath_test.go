package probes

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

func TestMultipath(t *testing.T) { runCases(t, "multipath", DefaultMultipath) }

func TestMultipathValidate(t *testing.T) {
	p := DefaultMultipath()
	p.MinPaths, p.LocalTargets, p.Settings = -1, []string{"IET"}, map[string]string{"a b": "c"}
	var fields []string
	for _, e := range FieldErrors(p.Validate()) {
		fields = append(fields, e.Field)
	}
	if d := cmp.Diff([]string{"minPaths", "localTargets[0]", "settings"}, fields); d != "" {
		t.Error(d)
	}
}

// Lines of `dmsetup status --noflush`, most captured from multipath-tools 0.11.1
// on kernel 6.12; want is the paths with A or F.
func multipathStatusLines() map[string]string {
	return map[string]string{
		"2 0 0 0 2 1 A 0 1 2 8:16 A 0 0 1 E 0 1 2 8:0 A 0 0 1 ": "8:16 A, 8:0 A",
		"2 0 0 0 2 1 A 0 1 2 8:16 F 1 0 1 E 0 1 2 8:0 A 0 0 1 ": "8:16 F, 8:0 A",
		"2 1 0 0 2 1 E 0 1 2 8:16 F 1 0 1 E 0 1 2 8:0 F 1 0 1 ": "8:16 F, 8:0 F",
		"2 0 0 0 1 1 A 0 2 2 8:16 A 0 0 1 8:32 F 2 0 1":         "8:16 A, 8:32 F",
		"2 0 1 0 2 1 A 0 1 0 8:16 A 0 D 0 1 0 65:128 A 0":       "8:16 A, 65:128 A",
		"2 0 0 0 0 0":                          "", // a map without any path
		"":                                     "error",
		"2 0 0 0 2 1 A 0 1 2 8:16 A 0 0 1":     "error",
		"2 0 0 0 1 1 A 0 1 2 8:16 X 0 0 1":     "error",
		"2 0 0 0 1 1 A 0 1 2 sdb A 0 0 1":      "error",
		"2 0 0 0 1 1 A 0 1 2 8:16 A 0 0 1 8:0": "error",
		"2 0 0 0 65000 1 A 0 1 2 8:16 A":       "error",
		"-1 0 0 0 1 1":                         "error",
	}
}

func TestParseMultipathStatus(t *testing.T) {
	for line, want := range multipathStatusLines() {
		paths, err := parseMultipathStatus(line)
		var got []string
		for _, p := range paths {
			mark := map[string]string{"active": "A", "failed": "F"}[p.kernel]
			got = append(got, devT(p.dev)+" "+mark)
		}
		text := strings.Join(got, ", ")
		if err != nil {
			text = "error"
		}
		if text != want {
			t.Errorf("%q: %s (%v), want %s", line, text, err, want)
		}
	}
}

func TestQueuesWithoutPath(t *testing.T) {
	for table, want := range map[string]bool{
		"1 queue_if_no_path 0 2 1 service-time 0 1 2 8:16 1 1 service-time 0 1 2 8:0 1 1 ": true,
		"0 0 2 1 service-time 0 1 2 8:16 1 1 service-time 0 1 2 8:0 1 1 ":                  false,
		"3 pg_init_retries 50 queue_if_no_path 1 alua 1 1 round-robin 0 1 1 8:16 1":        true,
		"2 queue_mode bio 0 1 1 service-time 0 1 2 8:16 1 1":                               false,
		"0 1 queue_if_no_path 1 1 round-robin 0 1 1 8:16 1":                                false, // a handler of that name is no feature
		"": false, "9": false,
	} {
		if got := queuesWithoutPath(table); got != want {
			t.Errorf("%q: %t, want %t", table, got, want)
		}
	}
}

// reply frames a body as multipathd does.
func multipathdFrame(body string) []byte {
	return append(binary.NativeEndian.AppendUint64(nil, uint64(len(body)+1)), body+"\x00"...)
}

// TestMultipathdConversation speaks over a real connection whose other end hands
// out its bytes one by one, and several replies on one connection.
func TestMultipathdConversation(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	asked := make(chan string, 8)
	go func() {
		defer theirs.Close()
		for _, body := range []string{"pid 349 idle\n", `{"maps":[{"name":"a","uuid":"w","new":{"x":[1]},"path_groups":[]}],"other":7}` + "\n", "timeout\n", "fail\nmap or partition in use\n", "defaults {\n\tfind_multipaths \"off\"\n}\n"} {
			var header [8]byte
			if _, err := io.ReadFull(theirs, header[:]); err != nil {
				return
			}
			command := make([]byte, binary.NativeEndian.Uint64(header[:]))
			if _, err := io.ReadFull(theirs, command); err != nil {
				return
			}
			asked <- string(command)
			for _, b := range multipathdFrame(body) {
				if _, err := theirs.Write([]byte{b}); err != nil {
					return
				}
			}
		}
	}()
	conn := &multipathdConn{Conn: ours, r: bufio.NewReader(ours)}
	if text, err := conn.text("show daemon"); text != "pid 349 idle" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	maps, err := conn.maps(NewMemory())
	if err != nil || len(maps) != 1 || maps[0].WWID != "w" {
		t.Errorf("%+v, %v", maps, err)
	}
	if _, err := conn.maps(NewMemory()); !errors.Is(err, errMultipathdTimeout) || !multipathdSilent(err) {
		t.Errorf("%v, want the daemon's timeout", err)
	}
	if _, err := conn.text("show maps"); err == nil || multipathdSilent(err) || !strings.Contains(err.Error(), "map or partition in use") {
		t.Errorf("%v, want the daemon's refusal", err)
	}
	if text, err := conn.text("show config local"); !strings.HasPrefix(text, "defaults {") || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := conn.text("show daemon"); err == nil || !multipathdSilent(err) {
		t.Errorf("%v, want a closed connection to count as silence", err)
	}
	for _, want := range []string{"show daemon\x00", "show maps json\x00"} {
		if got := <-asked; got != want {
			t.Errorf("asked %q, want %q", got, want)
		}
	}
}

func TestReadMultipathdReply(t *testing.T) {
	huge := binary.NativeEndian.AppendUint64(nil, 1<<40)
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"whole":        {multipathdFrame("ok\n"), ""},
		"empty":        {multipathdFrame(""), ""},
		"no length":    {[]byte{1, 2}, "unexpected EOF"},
		"nothing":      {nil, "EOF"},
		"length 0":     {make([]byte, 8), "claims 0 bytes"},
		"huge":         {huge, "claims 1099511627776 bytes"},
		"cut":          {multipathdFrame("ok\n")[:10], "unexpected EOF"},
		"NUL missing":  {multipathdFrame("ok\n")[:11], "EOF"},
		"wrong ending": {append(multipathdFrame("ok\n")[:11], 'x'), "does not end with NUL"},
	} {
		err := readMultipathdReply(bufio.NewReader(iotest.OneByteReader(bytes.NewReader(c.data))), func(io.Reader) error { return nil })
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestParseMultipathConfig(t *testing.T) {
	conf, err := parseMultipathConfig([]byte("defaults {\n\tverbosity 2\n\tprio_args \"\"\n\tfind_multipaths \"off\"\n}\n" +
		"blacklist {\n\tdevice {\n\t\tvendor \"IET\"\n\t}\n}\noverrides {\n\tno_path_retry \"queue\"\n\tprotocol {\n\t\ttype \"scsi:fcp\"\n\t}\n}\n# end\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]map[string]string{
		"defaults":  {"verbosity": "2", "prio_args": "", "find_multipaths": "off"},
		"blacklist": {},
		"overrides": {"no_path_retry": "queue"},
	}
	if d := cmp.Diff(want, conf.sections); d != "" {
		t.Error(d)
	}
	if len(conf.devices) > 0 {
		t.Errorf("a blacklisted device is taken for a device section: %v", conf.devices)
	}
	if v, ok := conf.setting("no_path_retry"); v != "queue" || !ok {
		t.Errorf("no_path_retry %q, %t", v, ok)
	}
	for _, bad := range []string{"defaults {", "}", "verbosity 2", "defaults {\n}\n}\n"} {
		if _, err := parseMultipathConfig([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// What is in force for a device: the last section that matches and has the key,
// below overrides and above defaults.
func TestMultipathDeviceSetting(t *testing.T) {
	conf, err := parseMultipathConfig([]byte("defaults {\n\tno_path_retry \"fail\"\n\tprio \"const\"\n}\ndevices {\n" +
		"\tdevice {\n\t\tvendor \"(LIO-ORG|SUSE)\"\n\t\tproduct \"RBD\"\n\t\tprio \"rbd\"\n\t}\n" +
		"\tdevice {\n\t\tvendor \"(LIO-ORG|SUSE)\"\n\t\tproduct \".*\"\n\t\tno_path_retry 12\n\t\tprio \"alua\"\n\t}\n" +
		"\tdevice {\n\t\tvendor \"LIO-ORG\"\n\t\tproduct \"*\"\n\t\tno_path_retry 120\n\t}\n" +
		"\tdevice {\n\t\tvendor \"(\"\n\t\tproduct \".*\"\n\t\tno_path_retry 1\n\t}\n}\n" +
		"overrides {\n\tfailback \"manual\"\n}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ vendor, product, key, want string }{
		{"LIO-ORG", "TCMU device", "no_path_retry", "120"},
		{"LIO-ORG", "TCMU device", "prio", "alua"},
		{"SUSE", "RBD", "no_path_retry", "12"},
		{"NETAPP", "LUN C-Mode", "no_path_retry", "fail"},
		{"NETAPP", "LUN C-Mode", "failback", "manual"},
		{"NETAPP", "LUN C-Mode", "rr_weight", ""},
	} {
		if got, ok := conf.deviceSetting(c.vendor, c.product, c.key); got != c.want || ok != (c.want != "") {
			t.Errorf("%s of %s %s: %q, want %q", c.key, c.vendor, c.product, got, c.want)
		}
	}
}

func TestMemoryForgetsMapsThatAreGone(t *testing.T) {
	m := NewMemory()
	m.Best("paths/a", 4)
	m.Best("paths/b", 2)
	m.Best("other/a", 7)
	m.Retain("paths/", func(key string) bool { return key == "paths/b" })
	for key, want := range map[string]int64{"paths/a": 1, "paths/b": 2, "other/a": 7} {
		if got := m.Best(key, 1); got != want {
			t.Errorf("%s: %d, want %d", key, got, want)
		}
	}
}

// TestMultipathOnATree checks a directory that is no running host: the maps are
// found by their names, and what only the kernel knows is told to be missing.
func TestMultipathOnATree(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"sys/block/dm-0/dm/uuid": "mpath-3600\n", "sys/block/dm-0/dm/name": "mpatha\n", "sys/block/dm-0/dm/suspended": "0\n", "sys/block/dm-0/dev": "253:0\n",
		"sys/block/dm-0/slaves/sda/dev": "8:0\n", "sys/block/sda/dev": "8:0\n", "sys/dev/block/8:0/device/state": "running\n",
		"proc/1/stat": "1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 5 0 0 0\n",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := host.OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	r, err := DefaultMultipath().Check(t.Context(), Input{Host: tree, Memory: NewMemory(), Now: time.Now()})
	if len(r.Findings) != 1 || r.Findings[0].Reason != "MultipathdDown" {
		t.Errorf("%v, want MultipathdDown", r.Findings)
	}
	if !errors.Is(err, host.ErrNotLive) || len(r.Samples) > 0 {
		t.Errorf("error %v, samples %v; want the paths' states to be told missing", err, r.Samples)
	}
}

func FuzzMultipathStatus(f *testing.F) {
	for line := range multipathStatusLines() {
		f.Add(line)
	}
	f.Add("1 queue_if_no_path 0 2 1 service-time 0 1 2 8:16 1 1 service-time 0 1 2 8:0 1 1 ")
	f.Fuzz(func(t *testing.T, line string) {
		queuesWithoutPath(line)
		paths, err := parseMultipathStatus(line)
		if err != nil && paths != nil {
			t.Errorf("%q: an error and %d paths", line, len(paths))
		}
		for _, p := range paths {
			if !strings.Contains(line, ":") || p.kernel == "" {
				t.Errorf("%q: path %+v", line, p)
			}
		}
	})
}

// capturedReplies are the bodies in the cases' dialogues.
func capturedReplies(f *testing.F) (bodies []string) {
	f.Helper()
	for _, name := range []string{"one-of-two-failed", "all-failed-queueing", "settings-differ"} {
		ar, err := txtar.ParseFile(filepath.Join("testdata", "multipath", name+".txtar"))
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			if strings.HasPrefix(file.Name, "socket/") {
				for part := range strings.SplitSeq(string(file.Data), "< mpath\n") {
					body, _, _ := strings.Cut(part, "\n> ")
					bodies = append(bodies, body)
				}
			}
		}
	}
	if len(bodies) < 6 {
		f.Fatalf("%d bodies in the cases", len(bodies))
	}
	return bodies
}

func FuzzMultipathdReply(f *testing.F) {
	for _, body := range capturedReplies(f) {
		f.Add(multipathdFrame(body))
	}
	f.Add(multipathdFrame("fail\ndevice not found\n"))
	f.Add(multipathdFrame("timeout\n"))
	f.Add(multipathdFrame(`{"maps":{}}`))
	whole := multipathdFrame(`{"maps":[]}`)
	f.Add(whole)
	f.Add(whole[:len(whole)-1]) // cut off
	f.Fuzz(func(t *testing.T, data []byte) {
		err := readMultipathdReply(bufio.NewReader(bytes.NewReader(data)), func(r io.Reader) error {
			maps, err := parseMultipathdMaps(r)
			for _, m := range maps {
				kernel := multipathMap{wwid: m.WWID, paths: []multipathPath{{}}}
				kernel.hear(&m)
				kernel.usable()
			}
			return err
		})
		if err == nil && (len(data) < 10 || binary.NativeEndian.Uint64(data) > uint64(len(data)-8)) {
			t.Errorf("%q is taken for a whole reply", data)
		}
	})
}

func FuzzMultipathConfig(f *testing.F) {
	for _, body := range capturedReplies(f) {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		conf, err := parseMultipathConfig(data)
		if err != nil && (conf.sections != nil || conf.devices != nil) {
			t.Errorf("%q: an error and a configuration", data)
		}
	})
}

// BenchmarkMultipath is a pass over 500 maps of 4 paths, all well, with what the
// daemon says of them.
func BenchmarkMultipath(b *testing.B) {
	const maps, paths = 500, 4
	var text, dm, links, said strings.Builder
	text.WriteString("-- procs --\n349 multipathd threads=7\n-- units --\nmultipathd.service mainpid=349\n")
	for m := range maps {
		wwid := fmt.Sprintf("36001405%024x", m)
		fmt.Fprintf(&dm, "device mpath%d mpath-%s 253:%d\ntable 0 2048 multipath 1 queue_if_no_path 0 1 1 service-time 0 %d 2", m, wwid, m, paths)
		status := fmt.Sprintf("2 0 0 0 1 1 A 0 %d 2", paths)
		if m > 0 {
			said.WriteString(",")
		}
		fmt.Fprintf(&said, `{
      "name" : "mpath%d", "uuid" : "%s", "sysfs" : "dm-%d", "failback" : "manual", "queueing" : "on", "paths" : %d, "write_prot" : "rw", "dm_st" : "active",
      "features" : "1 queue_if_no_path", "hwhandler" : "0", "action" : "", "path_faults" : 0, "vend" : "LIO-ORG", "prod" : "disk", "rev" : "4.0", "switch_grp" : 0, "map_loads" : 1,
      "path_groups": [{ "selector" : "service-time 0", "pri" : 1, "dm_st" : "active", "marginal_st" : "normal", "group" : 1, "paths": [`, m, wwid, m, paths)
		for p := range paths {
			n := m*paths + p
			disk, num := fmt.Sprintf("sd%d", n), fmt.Sprintf("8:%d", n)
			dir := fmt.Sprintf("platform/host%d/session%d/target%d:0:0/%d:0:0:%d/block/%s", p, p, p, p, m, disk)
			fmt.Fprintf(&dm, " %s 1 1", num)
			status += " " + num + " A 0 0 1"
			fmt.Fprintf(&text, "-- tree/sys/devices/%s/device/state --\nrunning\n", dir)
			fmt.Fprintf(&links, "/sys/block/%s -> ../devices/%s\n/sys/dev/block/%s -> ../../devices/%s\n", disk, dir, num, dir)
			if p > 0 {
				said.WriteString(",")
			}
			fmt.Fprintf(&said, `{ "dev" : "%s", "dev_t" : "%s", "dm_st" : "active", "dev_st" : "running", "chk_st" : "ready", "checker" : "tur", "pri" : 1, "host_wwnn" : "[undef]",
            "target_wwnn" : "[undef]", "host_wwpn" : "[undef]", "target_wwpn" : "[undef]", "host_adapter" : "[undef]", "lun_hex" : "0x0000000000000000", "marginal_st" : "normal"}`, disk, num)
		}
		said.WriteString("]}]}")
		fmt.Fprintf(&dm, "\nstatus 0 2048 multipath %s\n", status)
		fmt.Fprintf(&text, "-- tree/sys/block/dm-%d/dm/uuid --\nmpath-%s\n", m, wwid)
	}
	for p := range paths {
		fmt.Fprintf(&text, "-- tree/sys/class/iscsi_session/session%d/targetname --\niqn.2003-01.org.linux-iscsi:t\n", p)
	}
	fmt.Fprintf(&text, "-- socket/unix/@/org/kernel/linux/storage/multipathd --\n> mpath show daemon\n< mpath\npid 349 idle\n> mpath show maps json\n< mpath\n{\"maps\":[%s]}\n", said.String())
	fmt.Fprintf(&text, "-- dm --\n%s-- links --\n%s", dm.String(), links.String())
	h := hosttest.Parse(b, text.String())
	in := Input{Host: h, Memory: NewMemory(), Now: time.Now()}
	b.ReportAllocs()
	for b.Loop() {
		r, err := DefaultMultipath().Check(b.Context(), in)
		if err != nil || len(r.Findings) > 0 {
			b.Fatal(err, r.Findings)
		}
	}
}
