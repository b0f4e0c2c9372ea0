package probes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/hosthygiene/agent/pkg/host"
)

// shownVictims is how many processes the kill order shows, besides the daemons.
const shownVictims = 20

// Explain implements [Explainer]: whom the kernel kills first when memory runs
// out, by oom_score (oom_badness of mm/oom_kill.c, as proc(5) shows it), beside
// the oom_score_adj that each process has and the one it is meant to have.
func (p OOM) Explain(ctx context.Context, in Input) ([]Table, error) {
	c := oomCheck{OOM: p, ctx: ctx, in: in}
	c.run()
	c.loadPods(podsAge)
	intended := map[int]string{}
	for _, d := range c.daemons {
		want := strconv.Itoa(d.expected)
		if d.atMost {
			want = "at most " + want
		}
		intended[d.pid] = want + ", " + d.why
	}
	owner := map[string]string{}
	capacity, err := c.memoryCapacity()
	c.failed(err)
	for _, box := range c.boxes {
		who, ok := c.pods.container(box.podCgroup)
		owner[box.path] = "pod " + c.pods.name(box.podCgroup)
		if !ok || capacity == 0 || box.main == 0 {
			continue
		}
		owner[box.path] = "container " + who.String()
		if want, err := who.pod.score(*who.spec, who.init, box.QOS, capacity); err == nil && len(want.Scores) > 0 {
			intended[box.main] = fmt.Sprintf("%d, %s", want.Scores[0], want.Why)
		}
	}
	order := c.killOrder()
	t := Table{Title: "the kernel's kill order", Header: []string{"", "OOM_SCORE", "OOM_SCORE_ADJ", "INTENDED", "PID", "PROCESS", "OF"}}
	left := 0
	for i, v := range order {
		_, known := intended[v.PID]
		if i >= shownVictims && !known {
			left++
			continue
		}
		rank := strconv.Itoa(i + 1)
		if v.adj == unkillable {
			rank = "never"
		}
		t.Rows = append(t.Rows, []string{rank, strconv.Itoa(v.score), strconv.Itoa(v.adj), cmp.Or(intended[v.PID], "-"),
			strconv.Itoa(v.PID), v.Comm, c.ownerOf(v.PID, owner)})
	}
	if left > 0 {
		t.Rows = append(t.Rows, []string{"", "", "", "", "", fmt.Sprintf("%d more", left), ""})
	}
	return []Table{t}, errors.Join(c.errs...)
}

// victim is a process in the kernel's kill order.
type victim struct {
	host.Process
	score, adj int
}

// killOrder lists the processes that have memory of their own, those that are
// killed first in front. Of two with one score the kernel takes the one it finds
// later, which nobody can tell from here.
func (c *oomCheck) killOrder() []victim {
	var order []victim
	for _, p := range c.procs {
		if p.Kernel || p.State == 'Z' || p.PID == 1 { // init is never killed
			continue
		}
		score, ok, err := c.readScore(p.PID, "oom_score")
		c.failed(err)
		adj, ok2, err := c.readScore(p.PID, "oom_score_adj")
		c.failed(err)
		if ok && ok2 {
			order = append(order, victim{p, score, adj})
		}
	}
	slices.SortStableFunc(order, func(a, b victim) int {
		if never := (a.adj == unkillable) != (b.adj == unkillable); never {
			return cmp.Compare(b.adj, a.adj)
		}
		return cmp.Or(b.score-a.score, b.adj-a.adj, a.PID-b.PID)
	})
	return order
}

// ownerOf names the container, pod or unit a process belongs to.
func (c *oomCheck) ownerOf(pid int, containers map[string]string) string {
	data, err := c.in.Host.ReadFile(c.ctx, procFile(pid, "cgroup"))
	if err != nil {
		return "-"
	}
	group := cgroupOf(data)
	for g := group; g != "/" && g != "."; g = path.Dir(g) {
		if who := containers[g]; who != "" {
			return who
		}
	}
	for g := group; g != "/" && g != "."; g = path.Dir(g) {
		if name := path.Base(g); strings.HasSuffix(name, ".service") || strings.HasSuffix(name, ".scope") {
			return name
		}
	}
	return group
}
