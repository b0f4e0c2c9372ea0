package probes

import "context"

// Table shows what lies behind a probe's answer, for agent explain.
type Table struct {
	Title  string     `json:"title"`
	Header []string   `json:"header"`
	Rows   [][]string `json:"rows"`
}

// Explainer is a probe that has more to show than its findings. Explain may read
// more than a pass does; an error comes with the tables that could be made.
type Explainer interface {
	Explain(ctx context.Context, in Input) ([]Table, error)
}
