package report

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"
)

// pipes is a network without a kernel, so that a test's clock can stand still
// while nothing is on the wire.
type pipes struct{ conns chan net.Conn }

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p pipes) Close() error   { close(p.conns); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// asked is what a server was asked, and when.
type asked struct {
	mu    sync.Mutex
	lists []time.Time
	watch []time.Time
}

func (a *asked) note(watch bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if watch {
		a.watch = append(a.watch, time.Now())
	} else {
		a.lists = append(a.lists, time.Now())
	}
}

// follow runs agents against a server that answers as told, for some time.
func follow(t *testing.T, agents int, length time.Duration, answer func(w http.ResponseWriter, r *http.Request, watch bool)) *asked {
	network := pipes{make(chan net.Conn)}
	got := new(asked)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		watch := r.URL.Query().Get("watch") == "1"
		got.note(watch)
		w.Header().Set("Content-Type", "application/json")
		answer(w, r, watch)
	})}
	var running sync.WaitGroup
	running.Go(func() { server.Serve(network) })
	ctx, cancel := context.WithCancel(t.Context())
	for range agents {
		api, err := NewAPI("n1", &rest.Config{Host: "http://api.invalid", Dial: network.dial})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { api.Follow(ctx, func(*Node) {}) })
	}
	time.Sleep(length)
	cancel()
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	running.Wait()
	return got
}

const (
	listOfOne = `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"n1","uid":"u","resourceVersion":"7"}}]}`
	forbidden = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`
	tooMany   = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"TooManyRequests","code":429,"details":{"retryAfterSeconds":5}}`
)

func refuse(w http.ResponseWriter, code int, status string) {
	w.WriteHeader(code)
	io.WriteString(w, status)
}

// A hasty uninstall takes the rights of every agent some seconds before it takes
// the agents.
func TestFollowWithoutRightsAsksSeldom(t *testing.T) {
	for _, what := range []string{"list", "watch"} {
		synctest.Test(t, func(t *testing.T) {
			got := follow(t, 1, 30*time.Minute, func(w http.ResponseWriter, r *http.Request, watch bool) {
				if what == "list" || watch {
					refuse(w, http.StatusForbidden, forbidden)
					return
				}
				io.WriteString(w, listOfOne)
			})
			if n := len(got.lists); n < 20 || n > 80 {
				t.Errorf("%s forbidden: %d lists in half an hour, want one a minute", what, n)
			}
		})
	}
}

// An API server says no to everybody until it has read who may do what.
func TestFollowAfterAShortRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		got := follow(t, 20, 40*time.Second, func(w http.ResponseWriter, r *http.Request, watch bool) {
			switch {
			case time.Since(began) < 2*time.Second:
				refuse(w, http.StatusForbidden, forbidden)
			case watch:
				keepWatch(w, r, nil)
			default:
				io.WriteString(w, listOfOne)
			}
		})
		if n := len(got.watch); n != 20 {
			t.Errorf("%d of 20 watch their node 38 seconds after the refusals ended", n)
		}
	})
}

// A proxy that cuts every stream, or a server that is going away.
func TestFollowAWatchThatEndsAtOnce(t *testing.T) {
	for name, end := range map[string]func(w http.ResponseWriter){
		"in good order": func(http.ResponseWriter) {},
		"broken":        func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		synctest.Test(t, func(t *testing.T) {
			got := follow(t, 1, 10*time.Minute, func(w http.ResponseWriter, r *http.Request, watch bool) {
				if !watch {
					io.WriteString(w, listOfOne)
					return
				}
				w.WriteHeader(http.StatusOK)
				w.(http.Flusher).Flush()
				end(w)
			})
			if n := len(got.watch); n < 60 || n > 240 {
				t.Errorf("%s: %d watches in ten minutes, want one every 5 seconds on average", name, n)
			}
		})
	}
}

// keepWatch answers a watch and keeps it until the channel is closed or the
// client goes.
func keepWatch(w http.ResponseWriter, r *http.Request, until <-chan time.Time) {
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	select {
	case <-until:
	case <-r.Context().Done():
	}
}

func TestFollowGoesOnAfterTheTimeItAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := follow(t, 1, 24*time.Hour, func(w http.ResponseWriter, r *http.Request, watch bool) {
			if !watch {
				io.WriteString(w, listOfOne)
				return
			}
			seconds, err := strconv.Atoi(r.URL.Query().Get("timeoutSeconds"))
			if err != nil {
				t.Error(err)
			}
			keepWatch(w, r, time.After(time.Duration(seconds)*time.Second))
		})
		if l, n := len(got.lists), len(got.watch); l != 1 || n < 24 || n > 48 {
			t.Errorf("%d lists and %d watches in a day, want 1 and one every 30 to 60 minutes", l, n)
		}
	})
}

// The version a watch would go on from may be too old by then, each time.
func TestFollowAfterAnExpiredVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fresh := false
		got := follow(t, 1, 48*time.Hour, func(w http.ResponseWriter, r *http.Request, watch bool) {
			switch {
			case !watch:
				fresh = true
				io.WriteString(w, listOfOne)
			case !fresh:
				refuse(w, http.StatusGone, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}`)
			default:
				fresh = false
				seconds, err := strconv.Atoi(r.URL.Query().Get("timeoutSeconds"))
				if err != nil {
					t.Error(err)
				}
				keepWatch(w, r, time.After(time.Duration(seconds)*time.Second))
			}
		})
		for i, gone := range got.watch {
			if i%2 == 1 && i/2+1 < len(got.lists) && got.lists[i/2+1].Sub(gone) > watchSpread {
				t.Fatalf("%s without a watch after expiry number %d, want at most %s", got.lists[i/2+1].Sub(gone), i/2+1, watchSpread)
			}
		}
		if len(got.lists) < 40 {
			t.Errorf("%d lists in two days, want one every 45 minutes", len(got.lists))
		}
	})
}

// busiest is the largest number of times that fall into any span of that length.
func busiest(times []time.Time, span time.Duration) (most int) {
	for i, t := range times {
		n := 0
		for _, u := range times[i:] {
			if u.Sub(t) < span {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// The watches of a fleet end together when an API server stops.
func TestFollowSpreadsAFleetWhoseWatchesEndTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const agents = 200
		began := time.Now()
		got := follow(t, agents, 5*time.Minute, func(w http.ResponseWriter, r *http.Request, watch bool) {
			if !watch {
				io.WriteString(w, listOfOne)
				return
			}
			var stop <-chan time.Time
			if time.Since(began) < time.Minute {
				stop = time.After(time.Minute - time.Since(began))
			}
			keepWatch(w, r, stop)
		})
		if len(got.lists) != 2*agents || len(got.watch) != 2*agents {
			t.Fatalf("%d lists and %d watches, want each agent to come twice", len(got.lists), len(got.watch))
		}
		again := got.lists[agents:]
		if first, n := again[0].Sub(began), busiest(again, time.Second); first < time.Minute || n > agents/4 {
			t.Errorf("the first came back after %s, %d of %d within a second", first, n, agents)
		}
	})
}

// A server that turns away a whole fleet names the same second to everybody.
func TestRetryAfterIsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const agents = 200
		began := time.Now()
		got := follow(t, agents, time.Minute, func(w http.ResponseWriter, r *http.Request, watch bool) {
			switch {
			case watch:
				keepWatch(w, r, nil)
			case time.Since(began) < time.Second:
				w.Header().Set("Retry-After", "5")
				refuse(w, http.StatusTooManyRequests, tooMany)
			default:
				io.WriteString(w, listOfOne)
			}
		})
		if len(got.lists) != 2*agents {
			t.Fatalf("%d lists, want each agent to come twice", len(got.lists))
		}
		again := got.lists[agents:]
		if first, n := again[0].Sub(began), busiest(again, 100*time.Millisecond); first < 5*time.Second || n > agents/4 {
			t.Errorf("the first came back after %s, %d of %d within a tenth of a second", first, n, agents)
		}
	})
}

// A server that is upgraded ends the watch, and is asked for its version after
// that, when it answers again; while it goes on nobody asks.
func TestVersionIsAskedAfterABreak(t *testing.T) {
	var mu sync.Mutex
	version, asked, cut := "v1.36.3", 0, make(chan struct{})
	down, refused := false, make(chan struct{}, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.URL.Path == "/version":
			asked++
			fmt.Fprintf(w, `{"gitVersion": %q}`, version)
		case down:
			w.WriteHeader(http.StatusServiceUnavailable)
			refused <- struct{}{}
		case r.URL.Query().Get("watch") == "":
			fmt.Fprint(w, `{"kind": "NodeList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": []}`)
		default:
			end := cut
			mu.Unlock()
			w.(http.Flusher).Flush()
			select {
			case <-end:
			case <-r.Context().Done():
			}
			mu.Lock()
		}
	}))
	defer server.Close()
	api, err := NewAPI("n1", &rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan *Node, 10)
	var following sync.WaitGroup
	following.Go(func() { api.Follow(ctx, func(n *Node) { seen <- n }) })
	defer following.Wait()
	defer cancel()
	<-seen
	check := func(want string, times int) {
		t.Helper()
		for range 3 {
			if got, err := api.Version(ctx); got != want || err != nil {
				t.Errorf("%s, %v; want %s", got, err, want)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		if asked != times {
			t.Errorf("asked %d times, want %d", asked, times)
		}
	}
	check("v1.36.3", 1)
	mu.Lock()
	version = "v1.37.0"
	mu.Unlock()
	check("v1.36.3", 1)
	mu.Lock()
	down = true
	close(cut)
	cut = make(chan struct{})
	mu.Unlock()
	<-refused
	check("v1.36.3", 1) // nobody answers
	mu.Lock()
	down = false
	mu.Unlock()
	<-seen
	check("v1.37.0", 2)
}
