package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// record is what the agents' side saw during a phase.
type record struct {
	mu    sync.Mutex
	began time.Time
	kinds map[string]*kind
	dials int
	// told is how long it took from a change to the API server's word that the
	// node says so; lastTold is when that was done for the last node.
	told     []time.Duration
	lastTold time.Duration
	// starts is how long it took from an agent's start to its first complete
	// report in the API server.
	starts []time.Duration
}

// kind is one kind of request: list, watch, patch or event.
type kind struct {
	codes  map[int]int
	took   []time.Duration // until the answer's header, of those that succeeded
	second map[int]int     // how many were answered in each second of the phase
	asked  map[int]int     // how many were made in each, whatever became of them
}

func newRecord() *record { return &record{began: time.Now(), kinds: map[string]*kind{}} }

func (r *record) note(what string, code int, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[what]
	if k == nil {
		k = &kind{codes: map[int]int{}, second: map[int]int{}, asked: map[int]int{}}
		r.kinds[what] = k
	}
	k.codes[code]++
	k.asked[int((time.Since(r.began)-took)/time.Second)]++
	if ok(code) {
		k.took = append(k.took, took)
		k.second[int(time.Since(r.began)/time.Second)]++
	}
}

func (r *record) dialed() { r.mu.Lock(); r.dials++; r.mu.Unlock() }

func (r *record) toldAfter(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, d)
	r.lastTold = time.Since(r.began)
}

func (r *record) reportedAfter(d time.Duration) {
	r.mu.Lock()
	r.starts = append(r.starts, d)
	r.mu.Unlock()
}

func (r *record) sortedTold() []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(slices.Values(r.told))
}

func (r *record) sortedStarts() []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(slices.Values(r.starts))
}

func (r *record) toldCount() int { r.mu.Lock(); defer r.mu.Unlock(); return len(r.told) }
func (r *record) reported() int  { r.mu.Lock(); defer r.mu.Unlock(); return len(r.starts) }

// The outcomes of a request. An Event that is there already was posted by a
// request whose answer was lost.
func ok(code int) bool         { return code/100 == 2 || code == http.StatusConflict }
func turnedAway(code int) bool { return code == http.StatusTooManyRequests }
func refused(code int) bool    { return code == http.StatusUnauthorized || code == http.StatusForbidden }

// failed: no answer, or one that blames the server or the request.
func failed(code int) bool { return !ok(code) && !turnedAway(code) && !refused(code) }

// count says how many requests of a kind ("" for all) ended in some way.
func (r *record) count(what string, outcome func(code int) bool) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for name, k := range r.kinds {
		if what != "" && name != what {
			continue
		}
		for code, c := range k.codes {
			if outcome(code) {
				n += c
			}
		}
	}
	return n
}

// took is how long requests of a kind took, the shortest first.
func (r *record) took(what string) []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.kinds[what]; k != nil {
		return slices.Sorted(slices.Values(k.took))
	}
	return nil
}

// busiest is the largest number of writes that were answered in one second.
func (r *record) busiest() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	sum := map[int]int{}
	for _, what := range []string{"patch", "event"} {
		if k := r.kinds[what]; k != nil {
			for s, n := range k.second {
				sum[s] += n
			}
		}
	}
	return most(sum)
}

// asked is the largest number of requests of a kind that were made in one second.
func (r *record) asked(what string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.kinds[what]; k != nil {
		return most(k.asked)
	}
	return 0
}

func most(counts map[int]int) (n int) {
	for _, c := range counts {
		n = max(n, c)
	}
	return n
}

func (r *record) writes() int { return r.count("patch", ok) + r.count("event", ok) }

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(r.kinds)) {
		fmt.Fprintf(&b, "%s %v, ", what, r.kinds[what].codes)
	}
	fmt.Fprintf(&b, "%d connections, %d told, %d agents reported", r.dials, len(r.told), len(r.starts))
	return b.String()
}

// usage is what the processes had used at some moment.
type usage struct {
	at                time.Time
	api, etcd, agents time.Duration // of processor time
	apiRSS, etcdRSS   int64         // bytes
	// database is the size of etcd's file, and put the sum of all keys and values
	// ever written, both in bytes.
	database, put float64
	pid           int // of the API server
}

func (f *fleet) usage(ctx context.Context) (u usage, err error) {
	api, etcd, err := f.cp.PIDs()
	if err != nil {
		return u, err
	}
	metrics, err := f.etcdMetrics(ctx, "etcd_mvcc_db_total_size_in_bytes", "etcd_debugging_mvcc_total_put_size_in_bytes")
	if err != nil {
		return u, err
	}
	u.database, u.put, u.pid = metrics[0], metrics[1], api
	var self unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &self); err != nil {
		return u, err
	}
	u.agents = time.Duration(self.Utime.Nano() + self.Stime.Nano())
	var errs [4]error
	u.api, errs[0] = processorTime(api)
	u.etcd, errs[1] = processorTime(etcd)
	u.apiRSS, errs[2] = resident(api)
	u.etcdRSS, errs[3] = resident(etcd)
	u.at = time.Now()
	return u, errors.Join(errs[:]...)
}

func (f *fleet) etcdMetrics(ctx context.Context, names ...string) ([]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.cp.EtcdURL()+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	return metrics(text, names...)
}

// metrics reads metrics without labels from the text format.
func metrics(text []byte, names ...string) ([]float64, error) {
	values := make([]float64, len(names))
	found := 0
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if i := slices.Index(names, name); i >= 0 {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return nil, fmt.Errorf("metric %s: %w", name, err)
			}
			values[i] = v
			found++
		}
	}
	if found != len(names) {
		return nil, fmt.Errorf("of the metrics %v only %d are there", names, found)
	}
	return values, nil
}

// processorTime is utime and stime of /proc/PID/stat (proc_pid_stat(5)), in
// ticks of 1/100 s. The name before them may hold anything but ends at the last
// parenthesis.
func processorTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields after the name", pid, len(fields))
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// resident is VmRSS of /proc/PID/status, in bytes.
func resident(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, is := strings.CutPrefix(line, "VmRSS:"); is {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}

// phase is one thing done to a fleet and what it cost.
type phase struct {
	name          string
	nodes         int
	before, after usage
	// peakRSS is the most memory the API server had, looked at four times a second.
	peakRSS int64
	*record
}

func (p phase) length() time.Duration { return p.after.at.Sub(p.before.at) }

// api is the API server's processor time; of the new one's, start included, when
// it was started again meanwhile.
func (p phase) api() time.Duration {
	if p.after.pid != p.before.pid {
		return p.after.api
	}
	return p.after.api - p.before.api
}

// busy is how long the work of the phase took: until the last node was told of,
// or all of it.
func (p phase) busy() time.Duration {
	if p.lastTold > 0 {
		return p.lastTold
	}
	return p.length()
}

func (p phase) etcd() time.Duration   { return p.after.etcd - p.before.etcd }
func (p phase) client() time.Duration { return p.after.agents - p.before.agents }

// measure runs something and notes what it cost. What fails in it is returned
// with the phase.
func (f *fleet) measure(ctx context.Context, name string, run func(context.Context) error) (phase, error) {
	p := phase{name: name, nodes: len(f.agents)}
	var err error
	if p.before, err = f.usage(ctx); err != nil {
		return p, err
	}
	p.record = newRecord()
	f.record.Store(p.record)
	watching, enough := context.WithCancel(ctx)
	peak := make(chan int64)
	go func() { peak <- f.watchMemory(watching) }()
	failure := run(ctx)
	p.after, err = f.usage(ctx)
	enough()
	p.peakRSS = <-peak
	f.log.InfoContext(ctx, name, "nodes", p.nodes, "took", p.length().Round(time.Millisecond), "saw", p.record.String())
	return p, errors.Join(failure, err)
}

func (f *fleet) watchMemory(ctx context.Context) (most int64) {
	ticks := time.NewTicker(250 * time.Millisecond)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return most
		case <-ticks.C:
		}
		api, _, err := f.cp.PIDs()
		if err != nil {
			continue
		}
		if rss, err := resident(api); err == nil { // gone in an outage
			most = max(most, rss)
		}
	}
}

// percentile returns the value that a share of the sorted durations does not
// exceed (nearest rank); 0 of none.
func percentile(sorted []time.Duration, share float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(share*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}
