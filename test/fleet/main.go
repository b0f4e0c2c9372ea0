// Command fleet measures what a fleet of agents costs an API server, and when
// its word about a whole fleet is there: so many nodes that exist in the API
// alone, and for each the project's own reporting code with a connection and a
// pod-bound token of its own, against a real kube-apiserver and etcd.
//
//	go run ./test/fleet -nodes 500,1000
//	make bench-fleet      # all sizes, and into docs/performance.md
//
// What an agent finds is made up; what it sends is not. The kubelets' own work,
// the pods' coming and going and every other client are left out, but for the
// status update that each kubelet makes every five minutes, which an agent that
// watches its node is sent.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// settings are how long and how hard.
type settings struct {
	sizes    []int
	idle     time.Duration // watched without agents
	steady   time.Duration
	over     time.Duration // in which all agents start, and all nodes lose time
	minReady time.Duration // of the rollout
	limits   []int         // transitions a second tried on the largest fleet
	outage   time.Duration
}

func run(ctx context.Context, args []string) error {
	var s settings
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	sizes := flags.String("nodes", "500,1000,2500,5000", "sizes of the fleets to measure")
	limits := flags.String("limits", "100,200,300,400,500,600,800,1000,1500,2000", "transitions a second to try on the largest fleet, until the API server gives in; empty for none")
	flags.DurationVar(&s.idle, "idle", 30*time.Second, "how long to watch the API server without agents")
	flags.DurationVar(&s.steady, "steady", time.Minute, "how long to watch it with agents that find nothing new")
	flags.DurationVar(&s.over, "over", 10*time.Second, "in what time all agents start, and all nodes lose time")
	flags.DurationVar(&s.minReady, "min-ready", 10*time.Second, "minReadySeconds of the DaemonSet")
	flags.DurationVar(&s.outage, "outage", 15*time.Second, "how long the largest fleet loses its API server; 0 for no outage")
	doc := flags.String("doc", "", "`file` whose section to replace with the result")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var err error
	if s.sizes, err = numbers(*sizes); err != nil || len(s.sizes) == 0 {
		return fmt.Errorf("-nodes %q: want numbers with commas between: %w", *sizes, err)
	}
	if s.limits, err = numbers(*limits); err != nil {
		return fmt.Errorf("-limits %q: want numbers with commas between: %w", *limits, err)
	}
	if *doc != "" {
		if _, err := section(*doc); err != nil {
			return err
		}
	}
	m, err := thisMachine()
	if err != nil {
		return err
	}
	began := time.Now()
	var results []result
	for i, n := range s.sizes {
		r, err := measureSize(ctx, s, n, i == len(s.sizes)-1, &m)
		if err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
		results = append(results, r)
	}
	m.took = time.Since(began)
	text := document(m, s, results)
	fmt.Print(text)
	if *doc == "" {
		return nil
	}
	return replaceSection(*doc, text)
}

func numbers(list string) ([]int, error) {
	var out []int
	for word := range strings.SplitSeq(list, ",") {
		if word = strings.TrimSpace(word); word == "" {
			continue
		}
		n, err := strconv.Atoi(word)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("%q is no such number", word)
		}
		out = append(out, n)
	}
	return out, nil
}

// result is what was measured on a fleet of one size.
type result struct {
	nodes int
	// idle has no agents; steady has all of them.
	idle, start, steady, fault, recovery, rollout phase
	limits                                        []attempt
	outage                                        *phase
	nodeJSON                                      int // bytes of a Node as agents get it
}

// attempt is one rate of transitions that was tried.
type attempt struct {
	perSecond int
	phase
}

// settle lets the processes finish what the phase before left to them.
const settle = 5 * time.Second

func measureSize(ctx context.Context, s settings, nodes int, largest bool, m *machine) (r result, err error) {
	dir, err := os.MkdirTemp("", "fleet-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	manifests, err := manifestsDir()
	if err != nil {
		return r, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	f, err := newFleet(ctx, dir, population{nodes: nodes, lived: true, pass: 100 * time.Millisecond}, manifests, log)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.stop()) }()
	if err := m.describe(ctx, f); err != nil {
		return r, err
	}
	r.nodes = nodes
	living, end := context.WithCancel(ctx)
	defer end()
	go f.kubelets(living)

	wait := func(d time.Duration) func(context.Context) error {
		return func(ctx context.Context) error {
			select {
			case <-time.After(d):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	steps := []struct {
		name string
		into *phase
		run  func(context.Context) error
	}{
		{"no agents", &r.idle, wait(s.idle)},
		{"all agents start", &r.start, func(ctx context.Context) error { return f.start(ctx, s.over) }},
		{"steady", &r.steady, wait(s.steady)},
		{"all nodes lose time", &r.fault, func(ctx context.Context) error { return f.flip(ctx, nodes, s.over) }},
		{"all nodes regain time", &r.recovery, func(ctx context.Context) error { return f.flip(ctx, nodes, s.over) }},
		{"rollout restart", &r.rollout, func(ctx context.Context) error { return f.rollout(ctx, s.minReady) }},
	}
	for _, step := range steps {
		if err := wait(settle)(ctx); err != nil {
			return r, err
		}
		if *step.into, err = f.measure(ctx, step.name, step.run); err != nil {
			return r, fmt.Errorf("%s: %w", step.name, err)
		}
		want := map[*phase]string{&r.fault: "True", &r.recovery: "False", &r.rollout: "False"}[step.into]
		if want == "" {
			continue
		}
		// The agents' word is not enough.
		if n, err := f.saying(ctx, want); err != nil || n != nodes {
			return r, fmt.Errorf("%s: %d of %d nodes say %s=%s: %w", step.name, n, nodes, timeProblem, want, err)
		}
	}
	raw, err := f.admin.request(ctx, "GET", "/api/v1/nodes/"+f.agents[0].name, "", nil)
	if err != nil {
		return r, err
	}
	r.nodeJSON = len(raw)
	if !largest {
		return r, nil
	}
	if r.limits, err = findLimit(ctx, s, f, wait); err != nil || s.outage == 0 {
		return r, err
	}
	end() // the kubelets' updates would only fail
	p, err := f.measure(ctx, "outage", func(ctx context.Context) error { return f.outage(ctx, s.outage) })
	r.outage = &p
	return r, err
}

// findLimit raises the rate of transitions until the API server gives in.
func findLimit(ctx context.Context, s settings, f *fleet, wait func(time.Duration) func(context.Context) error) ([]attempt, error) {
	var tried []attempt
	for _, rate := range s.limits {
		if err := wait(settle)(ctx); err != nil {
			return tried, err
		}
		// Ten seconds of it, or as long as there are nodes.
		n := min(len(f.agents), 10*rate)
		over := time.Second * time.Duration(n) / time.Duration(rate)
		p, err := f.measure(ctx, fmt.Sprintf("%d transitions a second", rate), func(ctx context.Context) error { return f.flip(ctx, n, over) })
		p.nodes = n
		tried = append(tried, attempt{rate, p})
		if errors.Is(err, errNotAll) {
			return tried, nil
		}
		if err != nil || gaveIn(p) {
			return tried, err
		}
	}
	return tried, nil
}

// gaveIn: requests were turned away or failed, or a condition was later than the
// issue of a fault allows: two seconds for 95 of 100 nodes.
func gaveIn(p phase) bool {
	return p.count("", func(code int) bool { return !ok(code) }) > 0 || percentile(p.sortedTold(), 0.95) > 2*time.Second
}
