package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// machine is where the figures come from: they are worth nothing elsewhere.
type machine struct {
	processor        string
	cores            int
	memory           int64 // bytes
	kernel, load     string
	kubernetes, etcd string
	policies         []string
	took             time.Duration
}

func thisMachine() (m machine, err error) {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	memory, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return m, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return m, err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return m, err
	}
	m.cores = runtime.NumCPU()
	m.processor = "processor of unknown model"
	if _, rest, ok := bytes.Cut(cpu, []byte("model name\t: ")); ok {
		m.processor, _, _ = strings.Cut(string(rest), "\n")
	}
	if f := strings.Fields(string(memory)); len(f) > 1 { // MemTotal is the first line
		kb, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return m, err
		}
		m.memory = kb << 10
	}
	m.kernel, _, _ = strings.Cut(strings.TrimSpace(string(kernel)), "-")
	m.load, _, _ = strings.Cut(string(load), " ")
	return m, nil
}

// describe adds what only a running control plane knows.
func (m *machine) describe(ctx context.Context, f *fleet) (err error) {
	if m.policies, err = f.policies(ctx); err != nil {
		return err
	}
	raw, err := f.admin.request(ctx, http.MethodGet, "/version", "", nil)
	if err != nil {
		return err
	}
	var version struct{ GitVersion string }
	if err := json.Unmarshal(raw, &version); err != nil {
		return err
	}
	m.kubernetes = version.GitVersion
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.cp.EtcdURL()+"/version", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if raw, err = io.ReadAll(resp.Body); err != nil {
		return err
	}
	var etcd struct{ EtcdServer string }
	if err := json.Unmarshal(raw, &etcd); err != nil {
		return err
	}
	m.etcd = etcd.EtcdServer
	return nil
}

// document is the section of docs/performance.md.
func document(m machine, s settings, results []result) string {
	var b strings.Builder
	last := results[len(results)-1]
	fmt.Fprintf(&b, "Measured on one machine with %d processors (%s) and %.0f GB, Linux %s, Go %s, kube-apiserver %s, etcd %s; load average %s before the run, which took %s. A Node is %.1f KB of JSON as an agent is sent it. Admission policies in force: %s.\n\n",
		m.cores, m.processor, float64(m.memory)/(1<<30), m.kernel, strings.TrimPrefix(runtime.Version(), "go"), m.kubernetes, m.etcd, m.load,
		m.took.Round(time.Minute), float64(last.nodeJSON)/1000, strings.Join(m.policies, ", "))

	row := func(cells ...string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	head := func(cells ...string) { row(cells...); fmt.Fprintf(&b, "|%s\n", strings.Repeat("---|", len(cells))) }

	fmt.Fprintf(&b, "### Steady state\n\nFor %s, after %s without any agent.\n\n", s.steady, s.idle)
	head("nodes", "writes", "writes a second", "reads", "API server without agents", "with", "resident without", "with", "etcd without", "with")
	for _, r := range results {
		p := r.steady
		row(thousands(p.nodes), thousands(p.writes()), rate(p.writes(), p.length()), thousands(p.count("list", ok)+p.count("watch", ok)),
			perSecond(r.idle.api(), r.idle.length()), perSecond(p.api(), p.length()), megabytes(r.idle.after.apiRSS), megabytes(p.after.apiRSS),
			perSecond(r.idle.etcd(), r.idle.length()), perSecond(p.etcd(), p.length()))
	}
	for _, t := range []struct {
		title, text string
		of          func(result) phase
		wait        string
		waits       func(phase) []time.Duration
		requests    []string
	}{
		{"All nodes lose time", fmt.Sprintf("Evenly within %s: one patch (TimeProblem and Ready) and one Event a node.", s.over), func(r result) phase { return r.fault },
			"finding → condition", func(p phase) []time.Duration { return p.sortedTold() }, []string{"patch", "event"}},
		{"All nodes regain time", fmt.Sprintf("Evenly within %s.", s.over), func(r result) phase { return r.recovery },
			"finding → condition", func(p phase) []time.Duration { return p.sortedTold() }, []string{"patch", "event"}},
		{"All agents start", fmt.Sprintf("Evenly within %s, on nodes that know them: a connection, a list and a watch each, and the refreshes that are due.", s.over), func(r result) phase { return r.start },
			"start → first report", func(p phase) []time.Duration { return p.sortedStarts() }, []string{"list", "watch"}},
		{"Rollout restart", fmt.Sprintf("A tenth of the agents at a time, minReadySeconds %.0f.", s.minReady.Seconds()), func(r result) phase { return r.rollout },
			"start → first report", func(p phase) []time.Duration { return p.sortedStarts() }, []string{"list", "watch"}},
	} {
		fmt.Fprintf(&b, "\n### %s\n\n%s Latencies are p50 / p95 / p99 / longest.\n\n", t.title, t.text)
		names := []string{"nodes", "requests a node", "writes a second (busiest)", t.wait + ", s"}
		for _, what := range t.requests {
			names = append(names, what+", ms")
		}
		head(append(names, "done after", "turned away", "failed", "refused", "API server", "most resident", "etcd", "written to etcd", "database")...)
		for _, r := range results {
			p := t.of(r)
			cells := []string{thousands(p.nodes), requestsPerNode(p), fmt.Sprintf("%s (%s)", rate(p.writes(), p.busy()), thousands(p.busiest())),
				percentiles(t.waits(p), time.Second)}
			for _, what := range t.requests {
				cells = append(cells, percentiles(p.took(what), time.Millisecond))
			}
			row(append(cells, seconds(p.busy()), thousands(p.count("", turnedAway)), thousands(p.count("", failed)), thousands(p.count("", refused)),
				seconds(p.api()), megabytes(p.peakRSS), seconds(p.etcd()), megabytes(int64(p.after.put-p.before.put)), growth(p))...)
		}
	}

	fmt.Fprintf(&b, "\n### A node's share\n\nProcessor time of the API server is what it used beyond its idling without agents.\n\n")
	sizes := []string{"per node"}
	for _, r := range results {
		sizes = append(sizes, thousands(r.nodes))
	}
	head(append(sizes, fmt.Sprintf("%s : %s", thousands(last.nodes), thousands(results[0].nodes)))...)
	for _, line := range shares() {
		cells := []string{line.name}
		for _, r := range results {
			cells = append(cells, fmt.Sprintf("%.*f", line.digits, line.of(r)))
		}
		compared := "–"
		if first := line.of(results[0]); first > 0 {
			compared = fmt.Sprintf("%.2f", line.of(last)/first)
		}
		row(append(cells, compared)...)
	}
	if len(last.limits) > 0 {
		fmt.Fprintf(&b, "\n### Where it gives in\n\nRising rates of nodes that lose or regain time, on the largest fleet; ten seconds of each, or as long as there are nodes.\n\n")
		limitText(last, row, head)
		fmt.Fprintf(&b, "\n%s\n", limitVerdict(m, last))
	}
	if p := last.outage; p != nil {
		fmt.Fprintf(&b, "\n### The API server gone for %s\n\nThe %s agents made %s connection attempts (%.1f each) and needed %s from its end until the last watched its node again, its new start included; in the busiest second %s of them asked for their node. Turned away %s, failed %s (while it was gone), refused %s.\n",
			s.outage, thousands(last.nodes), thousands(p.dials), float64(p.dials)/float64(last.nodes), seconds(p.length()), thousands(p.asked("list")),
			thousands(p.count("", turnedAway)), thousands(p.count("", failed)), thousands(p.count("", refused)))
	}
	return b.String()
}

// limitText says where the API server of this machine gives in, and calls by its
// name what is only reckoned from that.
func limitText(r result, row, head func(...string)) {
	head("transitions a second", "nodes", "finding → condition, s", "patch, ms", "event, ms", "done after", "turned away", "failed", "API server", "etcd", "the agents")
	for _, p := range r.limits {
		row(thousands(p.perSecond), thousands(p.nodes), percentiles(p.sortedTold(), time.Second),
			percentiles(p.took("patch"), time.Millisecond), percentiles(p.took("event"), time.Millisecond), seconds(p.busy()),
			thousands(p.count("", turnedAway)), thousands(p.count("", failed)),
			perSecond(p.api(), p.length()), perSecond(p.etcd(), p.length()), perSecond(p.client(), p.length()))
	}
}

// limitVerdict is the sentence under the table of rates.
func limitVerdict(m machine, r result) string {
	var b strings.Builder
	kept := 0
	var beyond *attempt
	for _, a := range r.limits {
		if gaveIn(a.phase) {
			beyond = &a
			break
		}
		kept = a.perSecond
	}
	if beyond == nil {
		fmt.Fprintf(&b, "The API server kept up with every rate that was tried; the limit is above %s transitions a second.", thousands(kept))
		return b.String()
	}
	if kept > 0 {
		fmt.Fprintf(&b, "Up to %s transitions a second, 95 of 100 are told within two seconds and nothing is turned away. ", thousands(kept))
	}
	fmt.Fprintf(&b, "At %s a second the API server of this machine gives in: 95 of 100 are told within %.1f s and the last %.1f s after the first fault; %s requests are turned away and tried again, %s fail. ",
		thousands(beyond.perSecond), percentile(beyond.sortedTold(), 0.95).Seconds(), beyond.busy().Seconds(),
		thousands(beyond.count("", turnedAway)), thousands(beyond.count("", failed)))
	perNode := (beyondIdle(r, r.fault) + r.fault.etcd()).Seconds() / float64(r.nodes)
	fmt.Fprintf(&b, "The API server, etcd and all the agents share %d processors.\n\n*Extrapolation, not measured:* a transition costs the API server and etcd together %.1f ms of processor time, so a processor of this kind that does nothing else serves at most %.0f a second, and %s nodes that fail within ten seconds keep %.1f of them busy.",
		m.cores, perNode*1000, 1/perNode, thousands(4*r.nodes), perNode*float64(4*r.nodes)/10)
	return b.String()
}

type share struct {
	name   string
	digits int
	of     func(result) float64
}

// shares are what each node adds. None may grow with the fleet.
func shares() []share {
	n := func(r result) float64 { return float64(r.nodes) }
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	lines := []share{
		{"steady: API server, processor ms a minute", 2, func(r result) float64 {
			return ms(beyondIdle(r, r.steady)) / r.steady.length().Minutes() / n(r)
		}},
		{"steady: writes an hour", 2, func(r result) float64 { return float64(r.steady.writes()) / r.steady.length().Hours() / n(r) }},
		{"memory of the API server that the connected agents add, KB", 0, func(r result) float64 {
			return float64(r.steady.after.apiRSS-r.idle.after.apiRSS) / 1000 / n(r)
		}},
	}
	for _, w := range []struct {
		name string
		of   func(result) phase
	}{
		{"lost time", func(r result) phase { return r.fault }},
		{"regained time", func(r result) phase { return r.recovery }},
		{"start", func(r result) phase { return r.start }},
		{"restart", func(r result) phase { return r.rollout }},
	} {
		lines = append(lines,
			share{w.name + ": requests", 2, func(r result) float64 {
				p := w.of(r)
				return float64(p.count("", func(int) bool { return true })) / n(r)
			}},
			share{w.name + ": API server, processor ms", 2, func(r result) float64 { return ms(beyondIdle(r, w.of(r))) / n(r) }},
			share{w.name + ": etcd, processor ms", 2, func(r result) float64 { return ms(w.of(r).etcd()) / n(r) }},
			share{w.name + ": written to etcd, KB", 1, func(r result) float64 { p := w.of(r); return (p.after.put - p.before.put) / 1000 / n(r) }},
		)
	}
	return lines
}

// beyondIdle is the API server's processor time beyond what it uses without agents.
func beyondIdle(r result, p phase) time.Duration {
	idle := float64(r.idle.api()) / float64(r.idle.length())
	return p.api() - time.Duration(idle*float64(p.length()))
}

func requestsPerNode(p phase) string {
	var parts []string
	for _, what := range []string{"list", "watch", "patch", "event"} {
		if n := p.count(what, func(int) bool { return true }); n > 0 {
			parts = append(parts, fmt.Sprintf("%s %.2f", what, float64(n)/float64(p.nodes)))
		}
	}
	return strings.Join(parts, ", ")
}

func percentiles(sorted []time.Duration, unit time.Duration) string {
	digits := 0
	if unit == time.Second {
		digits = 2
	}
	var parts []string
	for _, share := range []float64{0.5, 0.95, 0.99, 1} {
		parts = append(parts, fmt.Sprintf("%.*f", digits, float64(percentile(sorted, share))/float64(unit)))
	}
	return strings.Join(parts, " / ")
}

func rate(n int, d time.Duration) string { return fmt.Sprintf("%.1f", float64(n)/d.Seconds()) }

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// perSecond is processor time a second, of one processor.
func perSecond(used, in time.Duration) string {
	return fmt.Sprintf("%.0f ms/s", float64(used.Microseconds())/1000/in.Seconds())
}

func megabytes(n int64) string { return fmt.Sprintf("%.0f MB", float64(n)/1e6) }

func growth(p phase) string { return fmt.Sprintf("+%.0f MB", (p.after.database-p.before.database)/1e6) }

func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// The section of a document that this program writes.
const (
	sectionBegin = "<!-- written by make bench-fleet: begin -->\n"
	sectionEnd   = "<!-- written by make bench-fleet: end -->\n"
)

// section returns what stands before and after the section in a file.
func section(file string) (around [2]string, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return around, err
	}
	before, rest, found := strings.Cut(string(data), sectionBegin)
	_, after, foundEnd := strings.Cut(rest, sectionEnd)
	if !found || !foundEnd {
		return around, fmt.Errorf("%s has no section between %q and %q", file, strings.TrimSpace(sectionBegin), strings.TrimSpace(sectionEnd))
	}
	return [2]string{before, after}, nil
}

func replaceSection(file, text string) error {
	around, err := section(file)
	if err != nil {
		return err
	}
	return os.WriteFile(file, []byte(around[0]+sectionBegin+text+sectionEnd+around[1]), 0o644)
}
