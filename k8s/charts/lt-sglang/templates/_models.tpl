{{- define "lt.modelsPod" -}}
metadata:
  labels:
    {{- include "lt.selector" (list . "models") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  serviceAccountName: {{ include "lt.engine" . }}
  securityContext:
    {{- include "lt.podSecurity" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  containers:
    - name: download
      image: {{ include "lt.image" (list . .Values.image) }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [sh, -ec]
      args:
        - |
          [ -f "$TARGET/.complete" ] && exit 0
          # Meta's repositories hold their weights twice.
          hf download "$MODEL" --revision "$REVISION" --local-dir "$TARGET" --exclude 'original/*'
          touch "$TARGET/.complete"
      env:
        - name: MODEL
          value: {{ .Values.model.name | quote }}
        - name: REVISION
          value: {{ .Values.model.revision | quote }}
        - name: TARGET
          value: {{ include "lt.modelPath" . }}
        - name: HOME
          value: /tmp
        {{- if .Values.model.tokenSecret.name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .Values.model.tokenSecret.name }}
              key: {{ .Values.model.tokenSecret.key }}
        {{- end }}
      resources:
        requests: {cpu: "2", memory: {{ .Values.modelCache.downloadMemory }}}
        limits: {cpu: "2", memory: {{ .Values.modelCache.downloadMemory }}}
      securityContext:
        {{- include "lt.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - name: models
          mountPath: /models
        - name: tmp
          mountPath: /tmp
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ include "lt.claim" . }}
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
{{- end }}

{{- /* A Job cannot be changed: another pod is another Job. */ -}}
{{- define "lt.modelsJob" -}}
{{ include "lt.name" . }}-models-{{ sha256sum (include "lt.modelsPod" .) | trunc 8 }}
{{- end }}

{{- define "lt.modelsSpec" -}}
backoffLimit: 6
activeDeadlineSeconds: 21600
template:
  {{- include "lt.modelsPod" . | nindent 2 }}
{{- end }}
