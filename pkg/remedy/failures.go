package remedy

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/hosthygiene/agent/pkg/report"
)

const (
	// failuresLease counts the failed steps of the whole fleet in annotations.
	failuresLease = "host-hygiene-failures"
	// AnnotationFailures is the count; admission lets an agent only raise it.
	AnnotationFailures = "hosthygiene.io/failures"
	// AnnotationFailed is the latest of them, for people.
	AnnotationFailed = "hosthygiene.io/failed-steps"

	// failuresKept bounds the annotation; a message is cut at failureText bytes.
	failuresKept = 32
	failureText  = 200
)

// Failures are the failed steps of the fleet since a person last cleared them.
// One step that fails on one node again and again is one failure: the budget is
// there to stop a change that does harm from spreading.
type Failures struct {
	Count  int
	Latest []Failure // the newest last
}

// Failure is a step that failed on a node.
type Failure struct {
	Node    string    `json:"node"`
	Step    string    `json:"step"`
	Time    time.Time `json:"time"`
	Message string    `json:"message"`
}

// String is one line for a person.
func (f Failure) String() string {
	text := fmt.Sprintf("%s on %s at %s: %s", f.Step, f.Node, f.Time.UTC().Format(time.RFC3339), f.Message)
	return strings.Map(func(r rune) rune { // it comes from other hosts and goes to a terminal
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// Failures reads them. A count that can not be read is an error, never zero.
func (g *Gate) Failures(ctx context.Context) (Failures, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	l, err := g.api.GetLease(ctx, Namespace, failuresLease)
	if apierrors.IsNotFound(err) {
		return Failures{}, nil
	}
	if err != nil {
		return Failures{}, fmt.Errorf("reading the failures of the fleet: %w", err)
	}
	return parseFailures(l)
}

func parseFailures(l *report.Lease) (Failures, error) {
	var f Failures
	text, ok := l.Metadata.Annotations[AnnotationFailures]
	if !ok {
		return f, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return f, fmt.Errorf("lease %s: annotation %s is %q, not a count: agent resume sets it right", failuresLease, AnnotationFailures, text)
	}
	f.Count = n
	// The list is for people; what somebody broke there stops nothing.
	if json.Unmarshal([]byte(l.Metadata.Annotations[AnnotationFailed]), &f.Latest) != nil {
		f.Latest = nil
	}
	return f, nil
}

// CountFailure adds a failure of this node to those of the fleet.
func (g *Gate) CountFailure(ctx context.Context, f Failure) error {
	f.Node = g.node
	f.Message = cut(f.Message, failureText)
	err := changeFailures(ctx, g.api, func(all *Failures, unreadable error) (bool, error) {
		if unreadable != nil {
			return false, unreadable // it stops the fleet as it is
		}
		known := slices.IndexFunc(all.Latest, func(o Failure) bool { return o.Node == f.Node && o.Step == f.Step })
		if known >= 0 {
			all.Latest = slices.Delete(all.Latest, known, known+1)
		} else {
			all.Count++
		}
		all.Latest = append(all.Latest, f)
		all.Latest = all.Latest[max(0, len(all.Latest)-failuresKept):]
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("counting a failure: %w", err)
	}
	return nil
}

// Resume clears the failures of the fleet and returns what they were, and whether
// there was anything to clear. It is for a person: admission refuses it to the
// agents' own token.
func Resume(ctx context.Context, api LeaseAPI) (were Failures, cleared bool, err error) {
	err = changeFailures(ctx, api, func(all *Failures, unreadable error) (bool, error) {
		were = *all
		*all = Failures{}
		cleared = unreadable != nil || were.Count != 0 || len(were.Latest) > 0
		return cleared, nil
	})
	if err != nil {
		return Failures{}, false, fmt.Errorf("clearing the failure stop: %w", err)
	}
	return were, cleared, nil
}

// changeFailures applies a change to the version that was read, again and again
// while others write at the same time. The change is told why what is there can
// not be read; when it returns false or an error nothing is written.
func changeFailures(ctx context.Context, api LeaseAPI, change func(all *Failures, unreadable error) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	for {
		l, err := api.GetLease(ctx, Namespace, failuresLease)
		exists := err == nil
		if apierrors.IsNotFound(err) {
			l, err = newLease(failuresLease), nil
		}
		if err != nil {
			return err
		}
		all, unreadable := parseFailures(l)
		write, err := change(&all, unreadable)
		if err != nil || !write {
			return err
		}
		list, err := json.Marshal(all.Latest)
		if err != nil {
			return err
		}
		if l.Metadata.Annotations == nil {
			l.Metadata.Annotations = map[string]string{}
		}
		l.Metadata.Annotations[AnnotationFailures] = strconv.Itoa(all.Count)
		l.Metadata.Annotations[AnnotationFailed] = string(list)
		if len(all.Latest) == 0 {
			delete(l.Metadata.Annotations, AnnotationFailed)
		}
		if exists {
			_, err = api.UpdateLease(ctx, l)
		} else {
			_, err = api.CreateLease(ctx, l)
		}
		if err == nil || !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rand.N(200 * time.Millisecond)):
		}
	}
}

// cut makes one short line of a text.
func cut(s string, limit int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
}
