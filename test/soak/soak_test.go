package soak

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func faults() []Fault {
	disk := Fault{Name: "disk", Takes: []string{"disk"}, Clears: 10 * time.Second,
		Tells: []Tell{{"disks", []string{"Missing"}, "sda", 20 * time.Second}}, May: []Saying{{"disks", "Offline"}}}
	clock := Fault{Name: "clock", Takes: []string{"clock"}, Clears: 5 * time.Second,
		Tells: []Tell{{"time", []string{"Offset", "Unsynchronized"}, "", 10 * time.Second}}}
	kill := Fault{Name: "kill", Takes: []string{"log"}, Clears: time.Minute, Momentary: true,
		Tells: []Tell{{"oom", []string{"Kill"}, "tail", 10 * time.Second}}}
	dead := Fault{Name: "dead", Takes: []string{"mount"}, Clears: 5 * time.Second, Alone: true,
		Tells: []Tell{{"disks", []string{"Unresponsive"}, "/mnt", 10 * time.Second}}}
	return []Fault{disk, clock, kill, dead}
}

func TestPlan(t *testing.T) {
	list := faults()
	const length = 30 * time.Minute
	pace := Pace{Length: length, Gap: 5 * time.Second, Least: 5 * time.Second, Most: 30 * time.Second, Brief: 3 * time.Second}
	plan := Plan(7, list, pace)
	if !reflect.DeepEqual(plan, Plan(7, list, pace)) {
		t.Error("the same seed makes another plan")
	}
	if reflect.DeepEqual(plan, Plan(8, list, pace)) {
		t.Error("another seed makes the same plan")
	}
	free := map[int]time.Duration{}
	count := map[int]int{}
	brief, overlaps := 0, 0
	for i, p := range plan {
		f := list[p.Fault]
		if p.At < free[p.Fault] {
			t.Errorf("%+v begins before the last one is over, at %s", p, free[p.Fault])
		}
		free[p.Fault] = p.At + p.For + f.Clears
		count[p.Fault]++
		switch {
		case p.Brief:
			brief++
			if p.For >= pace.Brief {
				t.Errorf("%+v is not brief", p)
			}
		case f.Momentary:
			if p.At+f.Clears > length {
				t.Errorf("%+v is told beyond the end", p)
			}
		case p.For < pace.Least || p.For >= pace.Most:
			t.Errorf("%+v lasts for the wrong time", p)
		}
		if p.At+p.For > length {
			t.Errorf("%+v is not over at the end", p)
		}
		for _, other := range plan[:i] {
			if p.At >= other.At+other.For {
				continue
			}
			overlaps++
			if f.Alone || list[other.Fault].Alone {
				t.Errorf("%+v is not alone with %+v", p, other)
			}
		}
	}
	if len(count) != len(list) || brief == 0 || overlaps == 0 {
		t.Errorf("%v of each, %d brief, %d overlap", count, brief, overlaps)
	}
	steps := Steps(plan)
	if len(steps) != 2*len(plan) || !slices.IsSortedFunc(steps, func(a, b Step) int { return int(a.At - b.At) }) {
		t.Errorf("steps: %v", steps)
	}
	begun := map[int]bool{}
	for _, s := range steps {
		if s.Begins == begun[s.Planned] {
			t.Errorf("step %+v out of order", s)
		}
		begun[s.Planned] = true
	}
}

func TestJudge(t *testing.T) {
	start := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	list := faults()
	made := func(f Fault, from, to float64) Made {
		return Made{Fault: f, From: at(from), Begun: at(from + 1), Mended: at(to - 1), To: at(to)}
	}
	metric := func(probe, reason string, from, to float64) Span {
		return Span{Saying: Saying{probe, reason}, From: at(from), To: at(to), Via: "metrics"}
	}
	condition := func(probe, reason, message string, from, to float64) Span {
		return Span{Saying: Saying{probe, reason}, From: at(from), To: at(to), Message: message, Via: "condition"}
	}
	disk, clock, kill := made(list[0], 100, 150), made(list[1], 120, 160), made(list[2], 200, 201)
	well := []Span{metric("disks", "Missing", 105, 155), metric("time", "Offset", 121, 162), metric("oom", "Kill", 203, 260)}
	shown := []Span{condition("disks", "Missing", "sda is gone", 104, 155), condition("time", "Offset", "far off", 121, 162), condition("oom", "Kill", "tail was killed", 203, 260)}
	brief := disk
	brief.Brief = true
	with := func(spans []Span, more ...Span) []Span { return append(slices.Clone(spans), more...) }

	tests := []struct {
		name                 string
		log                  []Made
		metrics, conditions  []Span
		missed, false, stuck int
	}{
		{name: "all told and cleared", log: []Made{disk, clock, kill}, metrics: well, conditions: shown},
		{name: "a consequence", log: []Made{disk, clock, kill}, metrics: with(well, metric("disks", "Offline", 104, 159)), conditions: shown},
		{name: "never told", log: []Made{disk, clock}, metrics: well[:1], conditions: shown[:1], missed: 1},
		{name: "told too late", log: []Made{kill}, metrics: []Span{metric("oom", "Kill", 215, 260)}, conditions: []Span{condition("oom", "Kill", "tail", 215, 260)}, missed: 1},
		{name: "told of another", log: []Made{disk}, metrics: well[:1], conditions: []Span{condition("disks", "Missing", "sdb is gone", 104, 155)}, missed: 1},
		{name: "only in the condition", log: []Made{disk}, conditions: shown[:1], missed: 1},
		{name: "a worse one hides its reason", log: []Made{disk}, metrics: well[:1], conditions: []Span{condition("disks", "Offline", "sdb is offline; sda is gone", 104, 155)}},
		{name: "the message is full", log: []Made{disk}, metrics: well[:1], conditions: []Span{condition("disks", "Offline", "sdb is offline … and 2 more", 104, 155)}},
		{name: "brief and told", log: []Made{brief}, metrics: well[:1], conditions: shown[:1]},
		{name: "brief and not told", log: []Made{brief}},
		{name: "out of nothing", log: []Made{disk}, metrics: with(well[:1], metric("pids", "Near", 300, 301)), conditions: shown[:1], false: 1},
		{name: "before it happened", log: []Made{disk}, metrics: []Span{metric("disks", "Missing", 90, 155)}, conditions: shown[:1], false: 1},
		{name: "still told", log: []Made{disk}, metrics: []Span{metric("disks", "Missing", 105, 161)}, conditions: shown[:1], stuck: 1},
		{name: "told again after the end", log: []Made{disk}, metrics: with(well[:1], metric("disks", "Missing", 400, 401)), conditions: shown[:1], false: 1},
		{name: "the condition remains", log: []Made{disk}, metrics: well[:1], conditions: []Span{condition("disks", "Missing", "sda is gone", 104, 161)}, stuck: 1},
		{name: "Unknown for no reason", log: []Made{disk}, metrics: well[:1], conditions: with(shown[:1], condition("disks", Unknown, "timeout", 130, 131)), false: 1},
		{name: "one after the other", log: []Made{disk, made(list[0], 155, 200)}, metrics: []Span{metric("disks", "Missing", 105, 205)}, conditions: []Span{condition("disks", "Missing", "sda is gone", 104, 205)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := Judge(tt.log, tt.metrics, tt.conditions)
			if len(v.Missed) != tt.missed || len(v.False) != tt.false || len(v.Stuck) != tt.stuck {
				t.Errorf("want %d missed, %d false, %d stuck: %s", tt.missed, tt.false, tt.stuck, v)
			}
			if v.Clean() != (tt.missed+tt.false+tt.stuck == 0) {
				t.Errorf("Clean is %t", v.Clean())
			}
		})
	}
	v := Judge([]Made{disk, clock, kill}, well, shown)
	if got := v.Told["disk"]; len(got) != 1 || got[0] != 4*time.Second {
		t.Errorf("told after %v", got)
	}
}

// The agents that are broken on purpose can be made of this tree.
func TestBrokenAgentsApply(t *testing.T) {
	diffs, err := filepath.Glob("../e2e/testdata/broken/*.diff")
	if err != nil || len(diffs) == 0 {
		t.Fatal(diffs, err)
	}
	for _, diff := range diffs {
		file, err := filepath.Abs(diff)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("git", "apply", "--check", file)
		cmd.Dir = "../.."
		// Also where the tree is no repository, or one above it is another.
		cmd.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES=/")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", filepath.Base(diff), err, strings.TrimSpace(string(out)))
		}
	}
}
